"""The checks of a data set behind `lightning_dice.inspect`.

- `survey`: measures every case (`case_statistics`, `texture`, `thumbnail`), for a `task`.
- `checks`: runs `split_checks`, `image_checks`, `mask_checks`, `duplicate_checks` and `alignment_checks`; each problem
  is a `finding`.
- `duplicates`, `alignment` and `orientations`: find copies, and masks that do not fit their images.
- `tables` and `html`: tables of the terminal, and the page.
"""
