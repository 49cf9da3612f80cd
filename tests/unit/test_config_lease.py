"""`lease` in `litestream.yml`: of one database, or one for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator.config import Config, LeaseSettings, load
from replicator.errors import ConfigError
from replicator.lease import Lease, LeaseTerms, read_lock
from replicator.leases import Leases
from replicator.storage import open_client

DATABASE = Path("/srv/app.db")


def read(top: str, *databases: str) -> Config:
    entries = [f"  - {{path: {number}.db, replica: {{path: r{number}}}, {keys}}}" for number, keys in enumerate(databases)]
    return load("\n".join([top, "dbs:", *entries]), environ={}, home=Path("/home/me"), folder=Path("/srv"), source="c.yml")


def leases(top: str, *databases: str) -> list[LeaseSettings | None]:
    return [item.lease for item in read(top, *databases).databases]


def test_a_database_has_none_unless_it_asks():
    assert leases("", "", "lease: true", "lease: false") == [None, LeaseSettings(), None]
    assert leases("lease: {ttl: 10s, owner: me}", "", "lease: true") == [None, LeaseSettings(ttl_s=10, owner="me")]


def test_a_database_may_have_terms_of_its_own():
    own = "lease: {ttl: 5s, takeover: true}"
    assert leases("lease: {ttl: 10s, owner: me}", own) == [LeaseSettings(ttl_s=5, owner="me", takeover=True)]


def test_one_lease_with_a_url_guards_all_that_do_not_say_no():
    first, second, third, fourth = leases(
        "lease: {url: 'file:///srv/hosts/a', ttl: 1m}", "", "lease: false", "lease: true", "lease: {takeover: true}"
    )
    assert first is not None
    assert first.home is not None
    assert (first.home.directory, first.ttl_s, second) == (Path("/srv/hosts/a"), 60.0, None)
    assert third == first
    assert fourth is not None
    assert fourth.takeover
    with Leases() as made:
        one, two, four = (made.arguments(item, DATABASE) for item in (first, third, fourth))
        assert isinstance(one["lease"], Lease)
        assert one["lease"] is two["lease"] is four["lease"]
        assert (one["takeover"], four["takeover"], made.arguments(first, DATABASE, takeover=True)["takeover"]) == (False, True, True)
        assert made.arguments(None, DATABASE)["lease"] is False
        own = made.arguments(LeaseSettings(ttl_s=5), DATABASE)
        assert (own["lease"], own["takeover"], own["lease_timeout_s"]) == (LeaseTerms(5.0), False, 0.0)


def test_whoever_asks_for_a_lease_is_heard_of_with_what_it_guards(tmp_path):
    (settings,) = leases(f"lease: {{url: 'file://{tmp_path}/home', ttl: 1m}}", "")
    asked: list[Path | None] = []
    with Leases(asked.append) as made:
        own = made.arguments(LeaseSettings(ttl_s=5), DATABASE)["on_handover"]
        assert own is not None
        own("there:2")
        shared = made.arguments(settings, DATABASE)["lease"]
        assert isinstance(shared, Lease)
        shared.acquire()
        with Lease(f"file://{tmp_path}/other") as other:
            assert not other.request()
        other = Lease(f"file://{tmp_path}/home", owner="there:2")
        assert other.request()
        shared.renew()
        assert asked == [DATABASE, None]


@pytest.mark.parametrize("stored", [True, False])
def test_a_shared_lease_is_not_released_where_something_was_not_stored(tmp_path, stored):
    (settings,) = leases(f"lease: {{url: 'file://{tmp_path}/home', ttl: 1m}}", "")
    with Leases() as made:
        shared = made.arguments(settings, DATABASE)["lease"]
        assert isinstance(shared, Lease)
        shared.acquire()
        if not stored:
            made.keep()
    found = read_lock(open_client(f"file://{tmp_path}/home"))
    assert found is not None
    assert found[1].released is stored


def test_its_place_may_be_in_s3_with_the_files_credentials():
    text = "access-key-id: AK\nsecret-access-key: hidden\nlease: {url: 's3://bucket/hosts/a', region: eu-central-1}"
    (found,) = leases(text, "")
    assert found is not None
    assert found.home is not None
    assert found.home.s3 is not None
    assert (found.home.s3.bucket, found.home.s3.path, found.home.s3.region, found.home.s3.access_key_id) == (
        "bucket",
        "hosts/a",
        "eu-central-1",
        "AK",
    )
    assert "hidden" not in repr(found)


@pytest.mark.parametrize(
    ("top", "keys", "message"),
    [
        ("lease: {ttl: 100ms}", "", r"c\.yml:1:14: lease\.ttl: must be 1s to 1h"),
        ("lease: {ttl: 2h}", "", r"lease\.ttl: must be 1s to 1h"),
        ("lease: {owners: me}", "", r"unknown key.*lease\.owners.*did you mean owner"),
        ("lease: {url: 'sftp://x/y'}", "", r"lease\.url: must be a URL of type file or s3"),
        ("lease: {url: somewhere}", "", r"lease\.url: must be a URL of type file or s3"),
        ("lease: yes please", "", r"lease must be a mapping"),
        ("", "lease: maybe", r"dbs\[0\]\.lease: must be true or false"),
        ("", "lease: {url: 'file:///x'}", r"unknown key.*dbs\[0\]\.lease\.url"),
        ("lease: {url: 'file:///x'}", "lease: {ttl: 5s}", r"dbs\[0\]\.lease: ttl and owner are those of the one lease"),
        ("", "lease: true, format: v0.3", r"dbs\[0\]\.lease: format v0\.3 has no leases"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error_with_its_place(top, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(top, keys)
