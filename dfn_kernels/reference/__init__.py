"""The formulas in plain PyTorch: any device, any float dtype, differentiable. All else is tested against them."""
