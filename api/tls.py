"""TLS at the API itself (RFC 8446), for where no proxy in front ends it."""

import ssl
from functools import partial
from pathlib import Path

from shared.config import BadSetting, Settings
from shared.tls_files import TlsFiles


def server_tls(settings: Settings) -> TlsFiles | None:
    """None where the API is to speak plain HTTP. Raises `BadSetting` for files that will not do."""
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return None
    return TlsFiles([certificate, key], partial(_server_context, certificate, key))


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    for variable, path in (("STOWGATE_TLS_CERTIFICATE", certificate), ("STOWGATE_TLS_KEY", key)):
        _check_readable(variable, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A peer could have the costly part of the handshake done over and over.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # An upload that is cut off is read to an end without close_notify, and is answered behind it.
    # That a body came whole is told by its length or its chunks. OpenSSL 1.1 has no other way.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)

    def refuse_to_ask() -> str:
        raise BadSetting(
            f"STOWGATE_TLS_KEY is '{key}', but must be a private key that is not encrypted"
        )

    try:
        context.load_cert_chain(certificate, key, password=refuse_to_ask)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadSetting(
                f"STOWGATE_TLS_KEY is '{key}', but must be the private key of the certificate in "
                f"'{certificate}'"
            ) from error
        raise BadSetting(
            f"STOWGATE_TLS_CERTIFICATE is '{certificate}' and STOWGATE_TLS_KEY '{key}', but must "
            "be PEM files: the certificate with the intermediate ones behind it, and its key"
        ) from error
    return context


def _check_readable(variable: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise BadSetting(
            f"{variable} is '{path}', but must be a file that can be read: {error.strerror}"
        ) from error
