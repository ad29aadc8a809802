"""Figures, drawn with matplotlib.

- `curves`: learning curves, and the distribution of Dice; `panels` and `thumbnails`: images with truth, prediction and
  errors; `mask_overlay`: predicted masks over their image.
- `report_plots`, `comparison_plot` and `sweep_chart`: the charts of a report, a comparison and a sweep.
- `style` and `colors`: shared by all.
"""
