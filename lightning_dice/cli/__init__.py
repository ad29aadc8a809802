"""Code shared by the commands: configs, errors, run folders, training, sweeps, launching, prediction."""
