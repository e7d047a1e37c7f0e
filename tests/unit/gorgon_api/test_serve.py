"""Before the server listens: its key, its address."""

from __future__ import annotations

import socket

import pytest

from gorgon_api import serve
from gorgon_api.auth import SingleKey, generate_key
from gorgon_common.errors import ConfigurationError
from gorgon_common.settings import load


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_on_loopback_a_key_is_made_up(address: str) -> None:
    first, generated = serve.key_for(load(), address)
    assert generated
    assert first != serve.key_for(load(), address)[0]
    assert len(first) >= 40


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_elsewhere_it_must_be_set(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="needs a key") as caught:
        serve.key_for(load(), address)
    assert "GORGON_API_KEY" in caught.value.hint
    monkeypatch.setenv("GORGON_API_KEY", "abc")
    assert serve.key_for(load(), address) == ("abc", False)


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1 port {port}") as caught:
            serve.listen("127.0.0.1", port)
    assert "--port 0" in caught.value.hint


def test_port_zero_takes_a_free_one() -> None:
    with serve.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_an_address_that_is_not_of_this_machine() -> None:
    with pytest.raises(ConfigurationError, match="Cannot listen"):
        serve.listen("192.0.2.1", 0)


def test_the_key_ring_knows_its_key_alone() -> None:
    key = generate_key()
    ring = SingleKey(key)
    assert ring.find(key) is not None
    for other in ("", key[:-1], key + "x", key.upper(), "\udcff"):
        assert ring.find(other) is None
    assert key not in repr(vars(ring))
