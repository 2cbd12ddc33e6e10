"""The command line, called in this process; what it said is read back."""

import json

from minidiffedit import cli


def ran(capsys, *argv):
    """The JSON of a command that succeeds."""
    assert cli.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys, *argv, code=1):
    """The one line on stderr of a command that fails."""
    assert cli.main([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    return err
