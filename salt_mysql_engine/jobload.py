"""A job's load: as the master stores it, as ``jids`` holds it, and how two of one job become one. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import jsontext
from .saltevent import TRIMMED, fun_text, is_texts, try_pack

_SECRETS = ("token", "password", "key", "auth_list")
"""What eauth may leave in a load or its ``kwargs`` (``publish``, salt/master.py: only ``auth_list`` is taken out)."""


def without_secrets(load: Mapping[str, Any]) -> dict[str, Any]:
    """A load without what authenticated it."""
    clean = {key: value for key, value in load.items() if key not in _SECRETS}
    if isinstance(clean.get("kwargs"), dict):
        clean["kwargs"] = {key: value for key, value in clean["kwargs"].items() if key not in _SECRETS}
    return clean


def is_publish(load: Mapping[str, Any]) -> bool:
    """Whether a load that the master stored is a publish's, and not made of a return: of one without a value, too, as
    any minion may send it."""
    return load.keys() >= {"tgt", "fun"} and "return" not in load and load.get("cmd") != "_return"


def publish_data(jid: str, load: Mapping[str, Any], own: list[str], minions: list[str] | None = None) -> dict[str, Any]:
    """The payload of a job's publish, from the load that the master stored of it and whom it was for.

    The parts of a batch job (3008) share a jid; the stored load is one part's, and a list target names its minions.
    ``minions`` are those of syndics, too, which any minion can say that it is: in the target is whom the master itself
    (``own``) sent the job to.
    """
    tgt = load["tgt"]
    missing: list[str] = []
    if load.get("tgt_type") == "list":
        aimed_at = tgt.split(",") if isinstance(tgt, str) else tgt if is_texts(tgt) else []
        there = frozenset(own)
        missing = [name for name in aimed_at if name not in there]
        if is_texts(tgt):
            named = frozenset(tgt)
            tgt = tgt + [name for name in own if name not in named]
    return {
        "jid": jid,
        "tgt_type": load.get("tgt_type", "glob"),
        "tgt": tgt,
        "user": load.get("user", ""),
        "fun": load["fun"],
        "arg": load.get("arg", []),
        "minions": own if minions is None else minions,
        "missing": missing,
        **{key: load[key] for key in ("kwargs", "ret") if key in load},
    }


def publish_event(jid: str, load: Mapping[str, Any], minions: list[str]) -> bytes | None:
    """The event of a job's publish, from the load that the master stores of it; ``None`` where that is no publish's."""
    if not is_publish(load):
        return None
    return try_pack(f"salt/job/{jid}/new", publish_data(jid, without_secrets(load), minions))


def return_data(jid: str, minion: str, cached: Mapping[str, Any], load: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a minion's return, in the order of Salt's own (``_return_pub``, salt/minion.py 3006-3008).

    Args:
        cached: ``return`` and, where the minion said them, ``retcode``, ``success`` and ``out``.
        load: the job's, as the master stored it. That of a salt-call or a schedule is the return itself.
    """
    if "return" in load and load.get("id") == minion:
        return {**load, **cached, "jid": jid}
    data: dict[str, Any] = {
        "cmd": "_return",
        "id": minion,
        **{key: cached[key] for key in ("success", "return", "retcode") if key in cached},
        "jid": jid,
        "fun": load.get("fun", ""),
        "fun_args": load.get("arg", load.get("fun_args", [])),
        **{key: load[key] for key in ("user",) if key in load},
    }
    kwargs = load.get("kwargs")
    if isinstance(kwargs, dict) and "metadata" in kwargs:
        data["metadata"] = kwargs["metadata"]
    if "out" in cached:
        data["out"] = cached["out"]
    return data


def published_load(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``jids`` gets of a publish, ``None`` where a type is wrong.

    ``kwargs`` and ``ret`` are known to the job cache alone. Names that Salt trimmed are no names.
    """
    minions, missing = ([] if names == TRIMMED else names for names in (data["minions"], data.get("missing", [])))
    if not is_texts(minions) or not is_texts(missing) or not isinstance(data["tgt"], (str, list)):
        return None
    load = {
        "jid": data["jid"],
        "tgt": data["tgt"],
        "tgt_type": data.get("tgt_type", "glob"),
        "fun": data["fun"],
        "arg": data["arg"],
        "user": data.get("user", ""),
        "Minions": minions,
        "missing": missing,
    }
    load.update({key: data[key] for key in ("kwargs", "ret") if key in data})
    return load


def load_of_return(minion: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`records.synthesised_load` makes of a return, from the minion's id and what it said; the value may be
    missing."""
    load = {key: value for key, value in data.items() if isinstance(key, str) and key not in ("return", "Minions")}
    if load.get("cmd") != "_return":
        load.pop("cmd", None)
    load.setdefault("arg", load.get("fun_args", []))
    load.setdefault("tgt", minion)
    load.setdefault("tgt_type", "glob")
    return load


def job_columns(load: Any) -> tuple[str, str, str]:
    """``fun``, ``user`` and ``tgt`` of a stored load as the columns of ``jids`` have them: cut, lists joined."""
    if not isinstance(load, Mapping):
        return "", "", ""
    return _column(load.get("fun")), _column(load.get("user")), _column(load.get("tgt"))


def _column(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(item for item in value if isinstance(item, str))
    if not isinstance(value, str):
        return ""
    return fun_text(value)


def parsed(text: Any) -> Any:
    """What a stored text says in JSON; ``None`` for what another writer left that is none: NULL, say."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def is_published(load: Mapping[str, Any]) -> bool:
    """Whether a stored load came from the publish itself, ours or saltext.mysql's."""
    return ("Minions" in load and "tgt" in load and "id" not in load) or load.get("cmd") == "publish"


def is_minions_alone(load: Mapping[str, Any]) -> bool:
    """Whether a load says no more than whom a syndic's part of a job is for: no row until the job itself is known.

    Salt lets any minion say that of any jid (``_handle_minion_event``, salt/master.py 3006-3008).
    """
    return "tgt" not in load


def merged_load(stored: Any, new: dict[str, Any]) -> dict[str, Any]:
    """What ``jids`` should hold once ``new``, a published load, arrives and ``stored`` stands there.

    A published load beats a synthesised one. Two published loads are one job's parts (3008 publishes
    a batch job once per sub-batch under one jid): their minions add up. Merging again changes nothing.
    """
    if not isinstance(stored, dict):
        return new
    if is_minions_alone(new):
        return {**stored, "Minions": _union(stored.get("Minions"), new["Minions"])}
    if not is_published(new):  # the start of a runner, which says no more than its return
        return stored
    merged = {**new, **stored} if is_published(stored) else dict(new)
    for key in ("Minions", "missing"):
        if isinstance(new.get(key), list):
            merged[key] = _union(stored.get(key), new[key])
    if isinstance(merged.get("tgt"), list) and isinstance(new.get("tgt"), list):
        merged["tgt"] = _union(merged["tgt"], new["tgt"])
    return merged


def _union(first: Any, second: list[Any]) -> list[Any]:
    known: list[Any] = first if isinstance(first, list) else []
    if all(isinstance(item, str) and item.isascii() for item in (*known, *second)):  # a hundred thousand minions
        there = set(known)
        return known + [item for item in second if item not in there]
    have = {jsontext.dumps(item) for item in known}
    return known + [item for item in second if jsontext.dumps(item) not in have]
