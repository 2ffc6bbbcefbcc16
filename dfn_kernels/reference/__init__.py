"""The formulas in plain PyTorch: any device, any float dtype, differentiable. What everything else is tested against."""
