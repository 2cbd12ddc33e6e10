"""`make table`: count the rows of every method at its defaults, and render the table of methods/README.md."""

import json
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "minidiffedit"


def counted():
    """Rows by what a row of the table says."""
    from minidiffedit.cost import rows_at_defaults
    from minidiffedit.methods.table import SYSTEMS

    return {repr(system): rows_at_defaults(name) for name, system in SYSTEMS.items() if system.edit}


def main():
    from minidiffedit.commands.methods import row_of, say_markdown
    from minidiffedit.methods.table import SYSTEMS

    (PACKAGE / "data" / "rows.json").write_text(json.dumps(counted(), indent=0) + "\n", encoding="utf-8")
    page = PACKAGE / "methods" / "README.md"
    table = say_markdown([row_of(name) for name in SYSTEMS]) + "\n"
    text, found = re.subn(r"\| method \| paper.*\n(?:\|.*\n)+", lambda match: table, page.read_text(encoding="utf-8"))
    assert found == 1, f"{page} has {found} tables of methods"
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
