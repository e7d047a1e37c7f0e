"""`/docs`: Swagger UI from an installed package, so that the page works without internet access."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

router = APIRouter(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Gorgon API</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="docs/swagger-ui.css">
  <style>
    body { margin: 0; background: #fff }
    @media (prefers-color-scheme: dark) { body { background: #1c2022 } }
    .swagger-ui .topbar { display: none }
  </style>
</head>
<body>
  <div id="swagger-ui"></div>
  <script src="docs/swagger-ui-bundle.js"></script>
  <script src="docs/page.js"></script>
</body>
</html>
"""
_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  validatorUrl: null,
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  persistAuthorization: false,
});
"""
_HEADERS = {
    # Nothing is loaded from other origins, even if a description asks for it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_TYPES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}


@router.get("/docs")
def page() -> Response:
    """Return the page."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)


@router.get("/docs/page.js")
def script() -> Response:
    """Return the script that starts Swagger UI."""
    return Response(_SCRIPT, media_type="text/javascript", headers=_HEADERS)


@router.get("/docs/swagger-ui.css")
def style() -> Response:
    """Return Swagger UI's style sheet."""
    return _asset("swagger-ui.css")


@router.get("/docs/swagger-ui-bundle.js")
def bundle() -> Response:
    """Return Swagger UI's script."""
    return _asset("swagger-ui-bundle.js")


def _asset(name: str) -> Response:
    body = resources.files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(body, media_type=_TYPES[name], headers={**_HEADERS, "Cache-Control": "max-age=3600"})
