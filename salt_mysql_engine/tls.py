"""The TLS that ``mysql.ssl_*`` asks for, the same for the writing and for the reading side."""

from __future__ import annotations

import ssl

from .errors import SettingsError
from .settings import Connection


def context(to: Connection) -> ssl.SSLContext | None:
    """What to connect with; ``None`` when no ``ssl_*`` is set.

    Raises:
        SettingsError: the files cannot be used.
    """
    if not to.tls:
        return None
    try:
        made = ssl.create_default_context(cafile=to.ssl_ca)
        # On since Python 3.13, and refuses the certificates that MySQL makes for itself.
        made.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not to.ssl_ca:
            # As MySQL's own clients do without a CA: encrypted, but to whoever answers.
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
        if to.ssl_cert:
            made.load_cert_chain(to.ssl_cert, to.ssl_key)
    except OSError as exc:  # ssl.SSLError is one
        raise SettingsError(f"mysql.ssl_*: the TLS files cannot be used: {exc}") from exc
    return made
