"""`varlab doctor RUN`: is this run normal?"""

from pathlib import Path

from varlab.config import argument_command

USAGE = """varlab doctor RUN [REFERENCE.csv]: is this run normal?
Compares the curves of RUN (metrics.csv) with the reference curves of its experiment: RUN/doctor.png, and as text which metrics are
out of band and why that might be."""


def run(arguments: list[str]) -> None:
    """Compares one run."""
    from varlab.training.reference_curves import report

    print(report(Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else None))


main = argument_command("doctor", USAGE, run)

if __name__ == "__main__":
    main()
