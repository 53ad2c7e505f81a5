"""`varlab doctor RUN`: compares a run with the reference curves of its experiment."""

from pathlib import Path

from varlab.config import argument_command

USAGE = """varlab doctor RUN [REFERENCE.csv]: is this run normal?
Compares the curves of RUN (metrics.csv) with the reference curves of its experiment. Writes RUN/doctor.png and prints the metrics
that are out of band, with possible causes."""


def run(arguments: list[str]) -> None:
    """Compares one run."""
    from varlab.training.reference_curves import report

    print(report(Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else None))


main = argument_command("doctor", USAGE, run)

if __name__ == "__main__":
    main()
