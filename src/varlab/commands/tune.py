"""`varlab tune`: trains a trained VAR further, by one of several methods."""

# a signal may arrive while the rest is imported
from varlab.training import signals

if __name__ == "__main__":
    signals.install()

from varlab.commands.train import run
from varlab.config import hydra_command

main = hydra_command("tune")(run)

if __name__ == "__main__":
    main()
