"""3D volumes in NIfTI: reading, resampling, normalization, data sets, and writing predictions."""
