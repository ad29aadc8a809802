"""Code that the commands share.

- `command`: command lines, `--help`, and running a command through Hydra; `config`: conf/, overrides, instantiation;
  `errors`: errors of the user.
- `run_folder`: the folder of a run, with its config and checkpoints; `adapt_checkpoint`: a checkpoint for other
  settings; `config_consistency`: the config in checkpoints, and on all ranks.
- `launcher`: which runs a process of `fit` trains; `rendezvous`: how the processes agree on them;
  `slurm`: requeued jobs.
- `experiment`: data, module and Trainer of a run; training, scoring and the summary.
- `sweep`: sweeps that are recorded and resumed; `trial_process` and `trial_tables`: their processes, table and picture.
- `prediction`: from image files to masks; `prediction_manifest`: what made the masks of a folder; `workers`: several
  processes; `progress`: the progress bar, and stopping.
"""
