"""``python -m m2f2cli``: what torchrun and accelerate launch."""

from m2f2cli.cli.app import main

if __name__ == "__main__":
    main()
