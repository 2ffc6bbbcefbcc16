"""The published import line runs as it stands: `from flownetwork import FlowNetwork`."""

from dfn.flownetwork import *  # noqa: F403
