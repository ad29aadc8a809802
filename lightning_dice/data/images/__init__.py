"""2D images.

- `sources` and `coco`: data sets of files with masks, and of COCO annotations; `datasets` reads their cases.
- `file_layout` matches images, masks and splits, with `image_folders`, `mask_finder` and `file_patterns`.
- `image_reader`: decodes files; `image_format`: their channels, range and nodata; `windowed_tiff`: large TIFFs and
  GeoTIFFs, window by window.
- `mask_format`: from the values of a mask file to class ids, and back; `raters`: several masks of an image.
- `dataset_summary`: the report of `check`.
- `prediction_io`: reads images to predict, and writes masks.
"""
