"""A data set behind a URL, served by a real HTTP server that now and then fails."""

import contextlib
import errno
import functools
import hashlib
import http.server
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from encoding import write_text_encoder
from latents import write_latents, write_vae
from processes import ROOT, demo_on, launch

from data_prep.sources import open_source
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import remote, tars
from ditmoe_ds.latents.loader import DataConfig, LatentDataset
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.tars import index_size
from ditmoe_ds.training.plan import read_plan


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers 404 to the first request of each path that ``failing`` names, cuts the first answer of each in ``cutting``, and sends 32 MB
    more than there is of each in ``flooding``."""

    failing: ClassVar[set[str]] = set()
    cutting: ClassVar[set[str]] = set()
    flooding: ClassVar[set[str]] = set()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if name in self.failing:
            self.failing.discard(name)
            self.send_error(404)
        elif name in self.cutting:
            self.cutting.discard(name)
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        elif name in self.flooding:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(Path(self.translate_path(self.path)).read_bytes() + bytes(32 << 20))
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler, folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path / "latents", train=20, val=4, per_shard=6)
    return tmp_path / "latents"


@pytest.fixture
def url(folder, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Handler, "failing", set())
    monkeypatch.setattr(Handler, "cutting", set())
    monkeypatch.setattr(Handler, "flooding", set())
    with serving(Handler, folder) as address:
        yield address


def test_samples_are_those_of_the_folder(folder, url, tmp_path):
    Handler.failing |= {"manifest.json", "train-000000.tar"}
    Handler.cutting |= {"train-000001.tar"}
    manifest = Manifest.load(url)
    assert manifest.digest == Manifest.load(folder).digest and manifest.digest is manifest.digest
    there = DataConfig(url, cache=str(tmp_path / "cache")).open([manifest], "train")
    here = LatentDataset([Manifest.load(folder)], "train")
    assert len(there) == len(here) == 20
    for i in (0, 5, 6, 19):
        assert torch.equal(there[i].latent, here[i].latent) and there.key(i) == here.key(i)
    assert not Handler.failing and not Handler.cutting
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_tars_of_images_are_tried_again(folder, url, tmp_path):
    whole = list(open_source(f"wds:{folder}/train-000000.tar").items())
    Handler.failing |= {"train-000000.tar"}
    Handler.cutting |= {"train-000001.tar"}
    found = list(open_source(f"wds:{url}/train-00000{{0..1}}.tar").items())
    assert len(found) == 12 and [item.key for item in found[:6]] == [item.key for item in whole]
    assert not Handler.failing and not Handler.cutting
    with pytest.raises(DataError, match=r"none\.tar: cannot be read in 6 attempts \(curl ended with 22\)$"):
        list(open_source(f"wds:{url}/none.tar").items())


def test_a_sha256_that_is_a_path_is_refused(folder, url, tmp_path):
    """It names the copy in the cache, which is deleted where it does not fit."""
    victim = write_latents(tmp_path / "mine", train=4, val=0)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["splits"]["train"]["shards"][0]["sha256"] = f"{victim}/train-000000"
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="shard 'train-000000.tar' has the sha256"):
        Manifest.load(url)


def test_the_cache_stays_within_its_bound(folder, url, tmp_path):
    manifest = Manifest.load(url)
    size = manifest.splits.train.shards[0].bytes
    cache = remote.Cache(tmp_path / "cache", int(2.5 * size))
    dataset = LatentDataset([manifest], "train", cache=cache)
    first = [dataset[i].latent for i in range(20)]
    tars = list((tmp_path / "cache").glob("*.tar"))
    assert 1 <= len(tars) <= 2
    assert all(torch.equal(dataset[i].latent, first[i]) for i in range(20)), "a shard that had to go is fetched again"


def test_the_longest_unused_goes_first(folder, url, tmp_path):
    shards = Manifest.load(url).splits.train.shards
    cache = remote.Cache(tmp_path / "cache", int(2.5 * shards[0].bytes))

    def get(number):
        return cache.file(f"{url}/{shards[number].name}", f"{number:032}.tar", shards[number].bytes, lambda path: None)

    os.utime(get(0), (1, 1))
    os.utime(get(1), (2, 2))
    get(0)
    assert {*map(get, (0, 2))} == {*(tmp_path / "cache").glob("*.tar")}


def test_what_does_not_come_whole_is_refused(folder, url, tmp_path, capsys):
    manifest = Manifest.load(url)
    dataset = LatentDataset([manifest], "train", cache=remote.Cache(tmp_path / "cache", 10**9))
    shard = folder / "train-000002.tar"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DataError, match=r"train-000002\.tar: cannot be read in 10 attempts \(sha256 differs"):
        dataset[13]
    assert capsys.readouterr().err.count("trying again") == 9
    os.truncate(folder / "train-000000.index.npy", 99)
    with pytest.raises(DataError, match=r"train-000000\.index\.npy: cannot be read in 10 attempts \(not the index of 6 samples\)"):
        dataset[0]
    with pytest.raises(DataError, match="6 attempts"):
        Manifest.load(f"{url}/elsewhere")


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.npy"])
def test_no_more_is_taken_than_the_manifest_says(folder, url, tmp_path, name):
    """Whatever the server sends: the bound of the cache counts what is there already."""
    shard = Manifest.load(url).splits.train.shards[0]
    dataset = LatentDataset([Manifest.load(url)], "train", cache=remote.Cache(tmp_path / "cache", 10**6))
    Handler.flooding |= {name}
    most = shard.bytes if name == shard.name else index_size(shard.samples)
    with pytest.raises(DataError, match=rf"{name}: cannot be read in 10 attempts \(more than {most} bytes\)$"):
        dataset[0]
    assert max(file.stat().st_size for file in (tmp_path / "cache").iterdir()) < 2 << 20


def test_what_is_read_into_memory_has_an_end(folder, url, bucket, monkeypatch):
    """Also what a program writes, which fails when nobody reads on."""
    monkeypatch.setattr(remote, "READ", 1 << 20)
    Handler.flooding |= {"manifest.json"}
    (folder / "manifest.json").rename(folder / "real.json")
    (folder / "manifest.json").write_bytes((folder / "real.json").read_bytes() + bytes(8 << 20))
    for root in (url, bucket):
        with pytest.raises(DataError, match=r"manifest.json: cannot be read in 6 attempts \(more than 1048576 bytes\)$"):
            Manifest.load(root)


def test_what_another_process_deleted_is_fetched_again(folder, url, tmp_path, monkeypatch):
    manifest, here = Manifest.load(url), LatentDataset([Manifest.load(folder)], "train")
    cache = remote.Cache(tmp_path / "cache", 1)  # less than a shard: it keeps one, with its index
    dataset = LatentDataset([manifest], "train", cache=cache)
    for i in (0, 19, 7):
        assert torch.equal(dataset[i].latent, here[i].latent)
    for ending in ("*.tar", "*.npy", "*.*"):
        for file in (tmp_path / "cache").glob(ending):
            file.unlink()
        assert torch.equal(dataset[7].latent, here[7].latent)

    fetched = cache.file

    def at_once_gone(*arguments, **options):
        path = fetched(*arguments, **options)
        path.unlink()
        return path

    monkeypatch.setattr(cache, "file", at_once_gone)
    dataset._reader.cache_clear()  # what is open can still be read
    with pytest.raises(DataError, match=r"train-000000\.tar: deleted from the cache before it was read, 6 times.*data\.cache_gb"):
        dataset[0]


def test_nothing_is_left_of_an_attempt_that_failed(monkeypatch):
    attempts = [b"an error page of a proxy", b"content"]

    def copy(url, out, most):
        out.write(attempts.pop(0))
        if attempts:
            raise OSError("reset")

    monkeypatch.setattr(remote, "_copy", copy)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    assert remote.read("https://here") == b"content"


def test_a_file_that_several_want_at_once_is_fetched_once(tmp_path, monkeypatch):
    """As all ranks of a host do; locks of files hold among threads as among processes."""
    fetched = []

    def slowly(url, out, most):
        fetched.append(url)
        time.sleep(0.3)
        out.write(b"1234")

    monkeypatch.setattr(remote, "_copy", slowly)
    with ThreadPoolExecutor(3) as pool:
        wanted = [pool.submit(remote.Cache(tmp_path, 100).file, "https://here", f"{0:032}.tar", 4, lambda path: None) for _ in range(3)]
    assert [one.result().read_bytes() for one in wanted] == [b"1234"] * 3 and fetched == ["https://here"]


def test_other_files_in_the_caches_folder_stay(folder, url, tmp_path):
    (tmp_path / "cache" / "more").mkdir(parents=True)
    (tmp_path / "cache" / "thesis.tex").write_text("years of work")
    os.utime(tmp_path / "cache" / "thesis.tex", (0, 0))
    dataset = LatentDataset([Manifest.load(f"{url}/")], "train", cache=remote.Cache(tmp_path / "cache", 1))
    assert len({dataset.key(i) for i in range(20)}) == 20 and len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert (tmp_path / "cache" / "thesis.tex").is_file() and (tmp_path / "cache" / "more").is_dir()


def test_any_part_of_a_mix_wants_a_cache(folder, url, tmp_path):
    settings = ["recipes/digits.yaml", f"data.manifest={folder}", f"data.mix=[{{manifest: '{url}'}}]", f"run_dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match="data.cache=.*is remote: name a local folder"):
        read_plan(settings, world=2)
    assert read_plan([*settings, f"data.cache={tmp_path}/cache"], world=2)


def test_a_damaged_copy_is_fetched_again(folder, url, tmp_path):
    """As after a power cut; once. What is damaged where it comes from is refused as before."""
    here = LatentDataset([Manifest.load(folder)], "train")
    zeros = lambda file: file.write_bytes(bytes(file.stat().st_size))  # noqa: E731 - whose damage shows only when a sample is read
    for pattern, damage in (("*.tar", lambda file: os.truncate(file, 0)), ("*.npy", lambda file: os.truncate(file, 3)), ("*.tar", zeros)):
        dataset = LatentDataset([Manifest.load(url)], "train", cache=remote.Cache(tmp_path / "cache", 10**9))
        assert dataset.key(0)
        for file in (tmp_path / "cache").glob(pattern):
            damage(file)
        again = LatentDataset([Manifest.load(url)], "train", cache=remote.Cache(tmp_path / "cache", 10**9))
        assert torch.equal(again[0].latent, here[0].latent)
        for file in (tmp_path / "cache").glob(pattern):
            damage(file)
        again._reader.cache_clear()
        with pytest.raises(DataError):
            again[0]


def test_a_cut_index_is_fetched_again(folder, url, tmp_path):
    Handler.cutting |= {"train-000000.index.npy"}
    dataset = LatentDataset([Manifest.load(url)], "train", cache=remote.Cache(tmp_path / "cache", 10**9))
    assert torch.equal(dataset[3].latent, LatentDataset([Manifest.load(folder)], "train")[3].latent)
    assert not Handler.cutting


@pytest.mark.parametrize("failures", [9, 10])
def test_a_disk_that_fails_for_minutes_is_waited_for_and_not_called_damage(failures, folder, monkeypatch, capsys):
    dataset, real, waited = LatentDataset([Manifest.load(folder)], "train"), os.pread, []
    expected = dataset[0].latent

    def stale(*arguments):
        if len(waited) < failures:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    if failures == 9:
        assert torch.equal(dataset[0].latent, expected)
    else:
        with pytest.raises(DataError, match=r"train-000000.tar: cannot be read in 10 attempts \(\[Errno 116\] Stale file handle\)$"):
            dataset[0]
    assert sum(waited) == 511 and capsys.readouterr().err.count("Stale file handle; trying again") == 9


def test_a_file_that_one_may_not_read_is_told_at_once(folder, monkeypatch):
    def forbidden(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    dataset = LatentDataset([Manifest.load(folder)], "train")
    monkeypatch.setattr(tars, "open", forbidden, raising=False)
    monkeypatch.setattr(remote.time, "sleep", None)
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be read \(Permission denied\)$"):
        dataset[0]


@pytest.fixture
def bucket(folder, tmp_path, monkeypatch):
    """Its files are those of ``folder``: a stub of ``aws s3 cp URL -``, whose next answer breaks off while there is a file ``cut``."""
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
[ "$#-$1-$2-$4" = 4-s3-cp-- ] || exit 9
file="{folder}/${{3#s3://bucket/}}"
if [ -e {tmp_path}/cut ]; then rm {tmp_path}/cut; head -c 100 "$file"; exit 1; fi
exec cat "$file"
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return "s3://bucket"


def test_s3_is_read_by_aws(folder, bucket, tmp_path, monkeypatch, capsys):
    here = LatentDataset([Manifest.load(folder)], "train")
    dataset = DataConfig(bucket, cache=str(tmp_path / "cache")).open([Manifest.load(bucket)], "train")
    (tmp_path / "cut").touch()
    assert torch.equal(dataset[13].latent, here[13].latent) and not (tmp_path / "cut").exists()
    assert "train-000002.tar: aws ended with 1; trying again" in capsys.readouterr().err

    (folder / "train-000000.tar").rename(folder / "a $(touch b); c.tar")  # no shell sees it
    (tmp_path / "cut").touch()
    items = list(open_source(f"wds:{bucket}/a $(touch b); c.tar").items())
    assert len(items) == 6 and not (tmp_path / "cut").exists()
    with pytest.raises(DataError, match=r"/none/manifest\.json: cannot be read in 6 attempts \(aws ended with 1\)$"):
        Manifest.load(f"{bucket}/none")
    monkeypatch.setenv("PATH", str(folder))
    capsys.readouterr()
    with pytest.raises(DataError, match=r"s3://bucket/manifest\.json: cannot be read: no file or program aws$"):
        Manifest.load(bucket)
    assert not capsys.readouterr().err, "it was tried again"


def test_a_url_that_nothing_opens_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "persist", None)
    settings = ["recipes/digits.yaml", f"run_dir={tmp_path}/run"]
    known = "'s4://b/x': nothing opens s4: URLs; choose a local path or one of ais://, file://, .*gs://, .*https://, .*s3://"
    for key, overrides in {
        "data.manifest": ["data.manifest=s4://b/x"],
        r"data.mix\[0\].manifest": [f"data.manifest={folder}", "data.mix=[{manifest: 's4://b/x'}]"],
    }.items():
        with pytest.raises(ConfigError, match=f"^{key}={known}"):
            read_plan([*settings, *overrides], world=2)
    with pytest.raises(ConfigError, match="^--source='wds:s4://b/{0..2}.tar': nothing opens s4: "):
        open_source("wds:s4://b/{0..2}.tar")
    monkeypatch.setenv("GOPEN_REWRITE", "s4://b=s3://c")
    assert open_source("wds:s4://b/{0..2}.tar").units == 3


def test_a_shells_pipe_is_no_url():
    assert remote.is_url("https://host/x") and remote.is_url("gs://bucket/x")
    assert not any(map(remote.is_url, ("pipe:touch x #://", "pipe://bin/touch x", "/data/latents", "latents")))


def test_a_shard_to_skip_is_one_shard(tmp_path):
    for name in ("real", "made"):
        write_latents(tmp_path / name, train=12, val=2, per_shard=6)
    both = [Manifest.load(tmp_path / name) for name in ("real", "made")]
    skipped = LatentDataset(both, "train", [f"{tmp_path}/made/train-000001.tar"])
    assert [(Path(m.root).name, shard.name[-5]) for m, shard in skipped.shards] == [("real", "0"), ("real", "1"), ("made", "0")]
    with pytest.raises(ConfigError, match=r"of several data sets: write .*/real/train-000001\.tar"):
        LatentDataset(both, "train", ["train-000001.tar"])
    with pytest.raises(ConfigError, match="no such train shard"):
        LatentDataset(both, "train", ["train-000009.tar"])


class Hub(http.server.SimpleHTTPRequestHandler):
    """A model hub with one repository, me/encoder. Notes what is asked, which begins with the rank that asks."""

    asked: ClassVar[list[str]] = []
    commit = "0123456789" * 4

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.partition("?")[0].endswith("/api/models/me/encoder"):
            return self.answer(200, json.dumps(dict(id="me/encoder", sha=self.commit)).encode())
        file = Path(self.directory, self.path.rpartition("/")[2])
        return self.answer(200, file.read_bytes()) if "/resolve/" in self.path and file.is_file() else self.answer(404)

    do_HEAD = do_GET

    def answer(self, code, content=b""):
        self.send_response(code)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def log_message(self, *args):
        pass


def text_run(folder, *overrides):
    """Arguments of a run of one step, conditioned on text."""
    settings = ["model.name=EC-DIT-Nano-4E", "parallel.expert=1", f"run_dir={folder}/run"]
    return [f"{ROOT}/recipes/digits.yaml", *settings, *demo_on("", 1), *overrides]


def test_one_rank_asks_a_server_for_all(tmp_path, monkeypatch):
    data, vae = tmp_path / "data" / "latents", write_vae(tmp_path / "vae")
    write_latents(data, train=20, val=4, per_shard=6, shape=(4, 8, 8), text=6, vae=vae)
    asked = []
    monkeypatch.setattr(Handler, "log_request", lambda self, *_: asked.append(self.path))
    code = "import os; os.chdir(os.environ['CACHES'] + os.environ['RANK']); from ditmoe_ds.train import main; exit(main())"
    monkeypatch.setenv("CACHES", f"{tmp_path}/cache")
    for rank in range(2):
        (tmp_path / f"cache{rank}").mkdir()
    grid = ["train.sample_every=1", "train.sample_images=4", "train.sample_steps=1"]
    with serving(Handler, data) as url:
        launch(2, ["-c", code, *text_run(tmp_path, f"data.manifest={url}", "data.cache=.", *grid)])
    assert asked.count("/val-000000.tar") == 1, "of the pictures' captions"
    assert asked.count("/manifest.json") == asked.count("/empty.text.safetensors") == 1


def test_the_first_rank_of_a_host_asks_the_hub(tmp_path, monkeypatch):
    write_text_encoder(tmp_path / "encoder", "bert", ("a", "b"))
    write_latents(tmp_path / "latents", train=20, val=4, per_shard=6, shape=(4, 8, 8), text=6)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    text = ["data.text_encoder=me/encoder", "data.text_max_tokens=8"]
    code = "import os; os.environ['HF_ENDPOINT'] += '/rank' + os.environ['RANK']; from ditmoe_ds.train import main; exit(main())"
    with serving(Hub, tmp_path / "encoder") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        launch(2, ["-c", code, *text_run(tmp_path, f"data.manifest={tmp_path}/latents", *text)])
    assert any(path.endswith("/model.safetensors") for path in Hub.asked)
    assert {path.split("/")[1] for path in Hub.asked} == {"rank0"}
