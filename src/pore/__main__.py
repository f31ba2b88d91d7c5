"""`python -m pore`, which is also what `torchrun -m pore` starts."""

from pore.cli.app import main

if __name__ == "__main__":
    main()
