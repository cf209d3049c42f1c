"""The rooms of the tests: which of them need the op alone, and where a file of tests lies."""

OF_THE_OP = ("cuda", "house", "modules", "op", "packaging", "pytorch", "refusals", "triton")
"""Their tests run under every supported torch, with nothing but what the op needs."""

OF_MORE = ("arm", "checked", "devices", "search")
"""Those of the others need an emulator, the whole tree, runtimes, or the packages of the search."""


def file_of(name: str) -> str:
    """The path of ``op/forward``, as pytest takes it."""
    room, _, stem = name.rpartition("/")
    return f"tests/{room}/test_{stem}.py"
