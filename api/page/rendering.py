"""Rendering of the operator's page: templates, links, security headers, errors and static files."""

from collections.abc import Mapping
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import orjson
from flask import Flask, Response, g, request, url_for
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydicom.uid import UID

from api.http.problems import NotFound
from api.http.routes import Scope, is_page
from api.page import words
from api.page.verdict import DEPENDENCIES

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    # Without a referrer of the same origin, browsers send `Origin: null` with a form (Fetch 3.1).
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_STATIC_TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

_PROBLEM = "application/problem+json"


class Pages:
    """Renders the templates in `api/page/templates`.

    All links are relative, so that the page works below every path prefix of a proxy.

    Args:
        scheme: The scheme of the Authorization header; empty without authentication.
    """

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._static = {
            name: files("api.page").joinpath("static", name).read_bytes() for name in _STATIC_TYPES
        }
        self._versions = {
            name: sha256(data).hexdigest()[:12] for name, data in self._static.items()
        }
        self._templates = Environment(
            loader=PackageLoader("api.page"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "sentence": words.sentence,
            "number": words.number,
            "counted": words.counted,
            "size": words.size,
            "duration": words.duration,
            "moment": words.moment,
            "brief_moment": words.brief_moment,
            "uid_name": _uid_name,
        }
        self._templates.globals |= {
            "link": link,
            "static": self._static_link,
            "Scope": Scope,
            "dependencies": DEPENDENCIES,
        }

    def render(
        self,
        template: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
        **values: Any,
    ) -> Response:
        caller = g.get("caller")
        text = self._templates.get_template(template).render(
            root=_root(),
            caller=caller,
            scopes=caller.scopes if caller else frozenset(),
            scheme=self._scheme,
            endpoint=request.endpoint or "",
            **values,
        )
        return Response(text, status, headers, content_type="text/html; charset=utf-8")

    def static(self, name: str) -> Response:
        """Return a static file. Raises `NotFound`."""
        if name not in self._static:
            raise NotFound("there is no such file")
        response = Response(self._static[name], content_type=_STATIC_TYPES[name])
        response.set_etag(self._versions[name])
        # The links have the version.
        response.cache_control.max_age = 86400
        response.make_conditional(request)
        return response

    def install(self, app: Flask) -> None:
        """Render errors of the page as HTML, and add its headers."""

        @app.after_request
        def finish(response: Response) -> Response:
            if not is_page(request.path):
                return response
            if response.content_type == _PROBLEM and request.accept_mimetypes.accept_html:
                response = self._error(response)
            response.headers.update(_HEADERS)
            if request.endpoint != "page.static":
                response.headers["Cache-Control"] = "no-store"
            return response

    def _error(self, problem: Response) -> Response:
        told = orjson.loads(problem.get_data())
        headers = {
            name: value
            for name, value in problem.headers.items()
            if name not in ("Content-Type", "Content-Length")
        }
        return self.render(
            "error.html",
            HTTPStatus(problem.status_code),
            headers,
            code=problem.status_code,
            title=told["title"],
            detail=told["detail"],
        )

    def _static_link(self, name: str) -> str:
        return f"{link('page.static', name=name)}?v={self._versions[name]}"


def link(endpoint: str, **values: Any) -> str:
    """Return the relative URL of an endpoint of the page, from the current path."""
    if endpoint == "page.overview":
        # Not `/`, which may be another service behind a proxy.
        query = url_for(endpoint, **values).partition("?")
        return f"{_root()}ui{''.join(query[1:])}"
    return _root() + url_for(endpoint, **values).removeprefix("/")


def _root() -> str:
    """Return the relative URL of the API's root."""
    return "../" * (request.path.count("/") - 1)


def _uid_name(uid: str) -> str:
    """Return the name of a UID of the standard, or the UID."""
    return UID(uid).name
