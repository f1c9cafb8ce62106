"""All campaigns, one after the other, then what they found is published: `make crash`."""

import argparse
import subprocess
import sys

CAMPAIGNS = (
    "states",
    "deaths",
    "kills",
    "joint_kills",
    "power",
    "errors",
    "spoiling",
    "fuzz",
    "together",
    "chaos",
    "mutations",
)


def main(arguments=None):
    """Returns the names of campaigns that found something bad, or could not be run."""
    parser = argparse.ArgumentParser(prog="python -m proof", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)}")
    options, rest = parser.parse_known_args(arguments)
    if unknown := set(options.names) - set(CAMPAIGNS):
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}")
    bad = []
    for name in options.names or CAMPAIGNS:
        print(f"== {name}", flush=True)  # noqa: T201
        done = subprocess.run([sys.executable, "-m", f"proof.{name}", *rest], check=False)
        if done.returncode != 0:
            bad.append(name)
    subprocess.run([sys.executable, "-m", "proof.publish"], check=True)
    return bad


if __name__ == "__main__":
    found = main()
    sys.exit(f"bad: {', '.join(found)}" if found else 0)
