"""The commands of `dora-dynamics`, one file each."""
