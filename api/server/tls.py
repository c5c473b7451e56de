"""TLS in the API itself (RFC 8446), for setups without a TLS proxy."""

import ssl
from functools import partial
from pathlib import Path

from api.settings import ApiSettings
from shared.runtime.tls_files import TlsFiles
from shared.settings.loader import BadSetting


def server_tls(settings: ApiSettings) -> TlsFiles | None:
    """Create the TLS context; None for plain HTTP.

    Raises:
        BadSetting: The certificate or the key is not usable.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return None
    return TlsFiles([certificate, key], partial(_server_context, certificate, key))


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    for variable, path in (("STOWGATE_TLS_CERTIFICATE", certificate), ("STOWGATE_TLS_KEY", key)):
        _check_readable(variable, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client could repeat the expensive part of the handshake.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A cut upload ends without close_notify, and its response is still sent. Length or chunks show
    # whether a body is complete. OpenSSL 1.1 does not have this option, and needs none.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)

    def refuse_prompt() -> str:
        raise BadSetting(f"STOWGATE_TLS_KEY is '{key}', but must be an unencrypted private key")

    try:
        context.load_cert_chain(certificate, key, password=refuse_prompt)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadSetting(
                f"STOWGATE_TLS_KEY is '{key}', but must be the private key of the certificate in "
                f"'{certificate}'"
            ) from error
        raise BadSetting(
            f"STOWGATE_TLS_CERTIFICATE is '{certificate}' and STOWGATE_TLS_KEY '{key}', but must "
            "be PEM files: the certificate followed by the intermediate ones, and its key"
        ) from error
    return context


def _check_readable(variable: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise BadSetting(
            f"{variable} is '{path}', but must be a readable file: {error.strerror}"
        ) from error
