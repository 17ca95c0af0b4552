"""`python -m dora_dynamics` is the command `dora-dynamics`."""

from dora_dynamics.cli import main

if __name__ == "__main__":
    main()
