"""The authenticator that the settings ask for."""

from pathlib import Path

from api.auth.basic import BasicUsers, parse_users
from api.auth.bearer import BearerTokens, TokenRules
from api.auth.guard import Anyone, Authenticator
from api.auth.issuer_keys import FetchedKeys, FileKeys, IssuerKeys, parse_keys
from api.auth.watched_file import WatchedFile
from shared.config import Settings


def authenticator(settings: Settings) -> Authenticator:
    """Raises `BadSetting` where a file that it needs is unusable; an issuer is asked later."""
    most_waiting, uploads = settings.most_waiting_to_enter, settings.concurrent_uploads
    if settings.auth == "basic":
        users = WatchedFile(Path(settings.users or ""), parse_users, "STOWGATE_USERS")
        return BasicUsers(users, most_waiting, most_joining=uploads)
    if settings.auth == "jwt":
        rules = TokenRules(
            issuer=settings.jwt_issuer or "",
            audience=settings.jwt_audience or "",
            algorithms=settings.jwt_algorithms,
            leeway_seconds=settings.jwt_leeway_seconds,
            vaes_claim=settings.jwt_vaes_claim,
            source_claim=settings.jwt_source_claim,
        )
        return BearerTokens(_keys(settings.jwt_keys or "", most_waiting + uploads), rules)
    return Anyone()


def _keys(source: str, most_waiting: int) -> IssuerKeys:
    if source.startswith(("http://", "https://")):
        return FetchedKeys(source, most_waiting)
    return FileKeys(WatchedFile(Path(source), parse_keys, "STOWGATE_JWT_KEYS"))
