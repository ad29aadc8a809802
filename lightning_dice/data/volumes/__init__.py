"""3D volumes in NIfTI.

- `sources` and `nnunet`: data sets in two folders and in nnU-Net's layout; `file_layout` finds the files.
- `nifti`: reads and writes files in canonical orientation.
- `preprocessing`: `normalization` of intensities and `resampling` to the network's spacing.
- `fingerprint` and `dataset_summary`: the properties of a data set, and the report of `check`.
- `augmentation`: MONAI's transforms.
- `prediction_io`: reads images to predict, and writes masks.
"""
