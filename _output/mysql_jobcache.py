"""
Show the lists of ``salt-run mysql_jobcache.*`` as tables.

.. versionadded:: 0.1.0

The runner asks for it by itself. ``--out=json`` and the like give the same data to programs.

.. code-block:: text

    jid                   started                    fun          target  user  targeted  answered  failed  missing
    20261123140005250000  2026-11-23T14:00:05+00:00  state.apply  web*    root        12        11       1        1
"""

import salt.output

__virtualname__ = "mysql_jobcache"

_WIDEST = 40  # a target may be a list of hundreds of minions


def __virtual__():
    return __virtualname__


def output(data, **kwargs):  # noqa: ARG001 (Salt's own call)
    """
    A line for each job, or for each minion of each job.
    """
    rows = _rows(data)
    if not rows:
        return salt.output.out_format(data, "nested", __opts__)
    header = list(rows[0])
    lines = [header, *(_cells(row, header) for row in rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(header))]
    numbers = [all(_is_number(row.get(name)) for row in rows) for name in header]
    shown = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(shown)


def _rows(data):
    if not isinstance(data, dict) or not all(isinstance(value, dict) and value for value in data.values()):
        return []
    rows = []
    for jid, value in data.items():
        if all(isinstance(inner, dict) for inner in value.values()):
            rows += [{"jid": jid, "minion": minion, **inner} for minion, inner in value.items()]
        else:
            rows.append({"jid": jid, **value})
    return rows


def _cells(row, header):
    cells = [_text(row.get(name)) for name in header]
    # The last column has what room there is.
    return [cell if len(cell) <= _WIDEST else cell[: _WIDEST - 3] + "..." for cell in cells[:-1]] + cells[-1:]


def _is_number(value):
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _text(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    # What minions say must not steer a terminal.
    return "".join(character if character.isprintable() else "?" for character in str(value))
