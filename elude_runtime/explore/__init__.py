"""The explorer: the report's pages and a live server behind one local address, which holds the server's key."""

try:
    import httpx  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:  # pragma: no cover - the tests' environment has them
    from elude_runtime.errors import EludeError

    raise EludeError(
        f"The explorer needs the package {error.name}: pip install 'elude-serving[report]', in a checkout '.[report]'."
    ) from error
