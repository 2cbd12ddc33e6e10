"""The run-time packages as installed here and all that they require, one `name==version` a line: what `make audit`
asks the advisory database about.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution


def required(name: str, found: dict[str, str]) -> None:
    """Add a distribution and, again and again, those it requires without an extra."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        here = distribution(name)
    except PackageNotFoundError:  # of another platform or Python
        return
    found[key] = here.version.partition("+")[0]  # a build's own suffix is unknown to the database
    for line in here.requires or ():
        if "extra ==" not in line:
            required(re.match(r"[\w.-]+", line)[0], found)


def main() -> None:
    found: dict[str, str] = {}
    required("minidiffedit", found)
    del found["minidiffedit"]
    print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))


if __name__ == "__main__":
    main()
