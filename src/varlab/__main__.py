"""`python -m varlab COMMAND`, and so `torchrun ... -m varlab COMMAND`."""

from varlab.cli import main

main()
