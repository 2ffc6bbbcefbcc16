"""How models are trained: losses, the trainer, checkpoints that are whole or not there, text."""

from .checkpoints import CheckpointError
from .losses import contrastive, field_reconstruction, language_modelling, mean_state_loss
from .text import Corpus, batches, load_corpus
from .trainer import History, NonFiniteLoss, Trainer, language_model_loss, parameter_groups

__all__ = [
    "CheckpointError",
    "Corpus",
    "History",
    "NonFiniteLoss",
    "Trainer",
    "batches",
    "contrastive",
    "field_reconstruction",
    "language_model_loss",
    "language_modelling",
    "load_corpus",
    "mean_state_loss",
    "parameter_groups",
]
