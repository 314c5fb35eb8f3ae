"""Rounding for the inputs that a model's matrices get: `transforms.quantize(calibrate=…)`."""
