"""Creation of the authenticator that `STOWGATE_AUTH` names."""

from pathlib import Path

from api.auth.basic import BasicUsers, parse_users
from api.auth.bearer import BearerTokens, TokenRules
from api.auth.guard import Authenticator, NoAuthentication
from api.auth.issuer_keys import FetchedKeys, FileKeys, IssuerKeys, parse_keys
from api.auth.watched_file import WatchedFile
from api.settings import ApiSettings


def authenticator(settings: ApiSettings) -> Authenticator:
    """Create the authenticator. The keys of an issuer are fetched later.

    Raises:
        BadSetting: A file that the settings name is not usable.
    """
    max_waiting, uploads = settings.max_waiting_to_enter, settings.concurrent_uploads
    if settings.auth == "basic":
        users = WatchedFile(Path(settings.users or ""), parse_users, "STOWGATE_USERS")
        return BasicUsers(users, max_waiting, max_joining=uploads)
    if settings.auth == "jwt":
        rules = TokenRules(
            issuer=settings.jwt_issuer or "",
            audience=settings.jwt_audience or "",
            algorithms=settings.jwt_algorithms,
            leeway_seconds=settings.jwt_leeway_seconds,
            vaes_claim=settings.jwt_vaes_claim,
            source_claim=settings.jwt_source_claim,
        )
        return BearerTokens(_keys(settings.jwt_keys or "", max_waiting + uploads), rules)
    return NoAuthentication()


def _keys(source: str, max_waiting: int) -> IssuerKeys:
    if source.startswith(("http://", "https://")):
        return FetchedKeys(source, max_waiting)
    return FileKeys(WatchedFile(Path(source), parse_keys, "STOWGATE_JWT_KEYS"))
