"""Shards behind URLs: fetched through faults, kept within bounds, the same images as on disk."""

import json
import shutil
import threading

import numpy as np
import pytest
from support.runs import config
from support.servers import Faults, http_server
from support.shards import make_shards

from varlab.commands import pack as pack_verb
from varlab.data import storage as remote
from varlab.data.images import ImageDataModule
from varlab.data.shards import ShardReader, load_manifest, verify
from varlab.data.storage import RemoteFile, Storage


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 5000)  # several ranges a shard
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.01)
    return Storage(cache_dir=str(tmp_path / "cache"), retries=3, timeout=1.0)


def images(reader: ShardReader) -> list[bytes]:
    return [reader.read(i) for i in range(len(reader))]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_shards_behind_a_web_server_are_the_shards_on_disk(knows_ranges, packed, storage):
    with http_server(packed, knows_ranges=knows_ranges) as url:
        for split in ("train", "val"):
            assert images(ShardReader(url, split, storage)) == images(ShardReader(packed, split))
        assert verify(url, storage) == 59


def test_a_file_is_fetched_once(packed, storage):
    faults = Faults()
    with http_server(packed, faults) as url:
        for _ in range(2):
            images(ShardReader(url, "train", storage))
    ranges = sum(-(-shard["num_bytes"] // 5000) for shard in load_manifest(packed)["splits"]["train"]["shards"])
    assert faults.requests == ranges


@pytest.mark.parametrize("plan", [["503"], ["cut"], ["stall"], ["slow"], ["503", "cut", "503", "", "cut", "stall"]])
def test_faults_of_the_server_are_survived(plan, packed, storage, caplog):
    with http_server(packed, Faults(*plan)) as url:
        assert images(ShardReader(url, "train", storage)) == images(ShardReader(packed, "train"))
    num_faults = sum(fault not in ("", "slow") for fault in plan)
    assert caplog.text.count("; attempt ") == num_faults


def test_a_connection_that_breaks_costs_one_range(packed, storage):
    faults = Faults("", "", "cut")
    with http_server(packed, faults) as url:
        reader = ShardReader(url, "train", storage)
        reader.read(0)
    assert faults.requests == 1 + -(-reader.shards[0].num_bytes // 5000)


def test_a_server_that_stays_down_is_an_error_that_names_the_file(packed, storage):
    with (
        http_server(packed, Faults(*["503"] * 20)) as url,
        pytest.raises(
            OSError, match=r"train-00000\d.tar \(bytes 0 to 5000 of \d+\) cannot be read after 4 attempts.*503"
        ),
    ):
        ShardReader(url, "train", storage).read(0)
    with pytest.raises(OSError, match=r"manifest.json cannot be read after 4 attempts"):
        ShardReader(url, "train", storage)


def test_what_is_not_there_is_not_asked_for_again(packed, storage, tmp_path):
    faults = Faults("404")
    with http_server(packed, faults) as url:
        with pytest.raises(OSError, match=r"train-00000\d.tar .*cannot be read: FileNotFoundError"):
            ShardReader(url, "train", storage).read(0)
        assert faults.requests == 1
        with pytest.raises(OSError, match=r"nothing/manifest.json cannot be read: FileNotFoundError"):
            ShardReader(f"{url}/nothing", "train", storage)
    with pytest.raises(ValueError, match=r"ftq://host/x/manifest.json cannot be opened"):
        ShardReader("ftq://host/x", "train", storage)


def test_a_missing_package_is_named(packed, storage, monkeypatch):
    def url_to_fs(url, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(ValueError, match=r"gs://bucket/x/manifest.json cannot be opened: pip install 'varlab\[gcs\]'"):
        ShardReader("gs://bucket/x", "train", storage)


def test_another_content_than_the_manifest_says_is_refused(packed, storage, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    shard = other / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with http_server(other) as url:
        with pytest.raises(OSError, match=r"train-000001.tar is not the file that the manifest describes"):
            images(ShardReader(url, "train", storage))
        with pytest.raises(ValueError, match=r"1 files are broken: .*train-000001.tar is not the file"):
            verify(url, storage)
    assert not list(storage.folder.glob("*.partial"))


def test_the_cache_stays_within_its_bound(packed, storage, tmp_path):
    shards = load_manifest(packed)["splits"]["train"]["shards"]
    largest, index_bytes = max(shard["num_bytes"] for shard in shards), 48 * 24 + 1000
    small = Storage(**{**storage.__dict__, "cache_gb": (largest + index_bytes) / 1e9})
    faults, most = Faults(), 0
    with http_server(packed, faults) as url:
        reader = ShardReader(url, "train", small)
        for i in np.random.default_rng(0).permutation(48):
            assert reader.read(int(i)) == ShardReader(packed, "train").read(int(i))
            most = max(most, sum(file.stat().st_size for file in small.folder.iterdir()))
        assert most <= small.cache_gb * 1e9
        assert faults.requests > 48  # a shard is fetched anew for nearly each image: too small a cache for this order
        data = ImageDataModule(url, 16, 8, num_workers=0, storage=small)
        with pytest.raises(ValueError, match=r"cache_gb=.* is too small for http.*lanes=64 and window=4096"):
            data.setup()
        with pytest.raises(OSError, match="cannot hold a single shard"):
            ShardReader(
                url, "val", Storage(**{**storage.__dict__, "cache_gb": 1e-7, "cache_dir": str(tmp_path / "new")})
            )


def test_readers_side_by_side_share_a_cache_that_is_too_small(packed, storage):
    shards = load_manifest(packed)["splits"]["train"]["shards"]
    size = max(shard["num_bytes"] for shard in shards) + 5000
    small = Storage(**{**storage.__dict__, "cache_gb": 2 * size / 1e9})
    with http_server(packed) as url:
        found: list[list[bytes]] = []
        readers = [ShardReader(url, "train", small) for _ in range(3)]
        threads = [threading.Thread(target=lambda reader=reader: found.append(images(reader))) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == [images(ShardReader(packed, "train"))] * 3


def test_other_files_in_the_folder_of_the_cache_are_let_alone(packed, storage):
    storage.folder.mkdir()
    (storage.folder / "thesis").write_bytes(b"x" * 10_000)
    (storage.folder / "figures").mkdir()
    Storage(**{**storage.__dict__, "cache_gb": 1e-5}).make_room(9_000, storage.folder / f"{'1' * 64}.9000.partial")
    assert (storage.folder / "thesis").stat().st_size == 10_000


def test_what_a_killed_process_left_is_completed_or_removed(packed, storage):
    with http_server(packed) as url:
        shard = ShardReader(url, "train", storage).shards[0]
        partial = storage.folder / f"{shard.sha256}.{shard.num_bytes}.partial"
        partial.write_bytes((packed / "train-000000.tar").read_bytes()[:7000])
        faults = Faults()
        with http_server(packed, faults) as again:
            storage.fetch(RemoteFile(f"{again}/train-000000.tar", shard.num_bytes, shard.sha256))
        assert faults.requests == -(-(shard.num_bytes - 7000) // 5000)
        left = storage.folder / f"{'0' * 64}.900000.partial"
        left.write_bytes(b"x")
        Storage(**{**storage.__dict__, "cache_gb": 1e-3}).make_room(
            500_000, storage.folder / f"{'1' * 64}.500000.partial"
        )
        assert not left.exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_from_a_url_are_those_from_disk(num_workers, packed, storage):
    def batches(path):
        data = ImageDataModule(str(path), 16, 8, num_workers=num_workers, storage=storage)
        data.setup()
        return [batch.images.sum(dim=(1, 2, 3)).tolist() for batch in data.train_dataloader()]

    with http_server(packed, Faults("cut", "503")) as url:
        assert batches(url) == batches(packed)


def test_a_server_that_dies_ends_the_epoch_with_a_sentence(packed, storage):
    with http_server(packed) as url:
        data = ImageDataModule(url, 16, 8, num_workers=1, storage=storage)
        data.setup()
        for file in storage.folder.iterdir():
            file.unlink()
    with pytest.raises(OSError, match=r"cannot be read after 4 attempts"):
        list(data.train_dataloader())


@pytest.fixture(scope="module")
def bucket(packed):
    """The shards in an S3-compatible store on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "key", "secret": "secret"}
    client = boto3.client(
        "s3", endpoint_url=options["endpoint_url"], aws_access_key_id="key", aws_secret_access_key="secret",
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="images")
    for file in packed.iterdir():
        client.upload_file(str(file), "images", f"digits/{file.name}")
    yield options
    server.stop()


def test_shards_in_an_object_store_are_the_shards_on_disk(bucket, packed, storage):
    in_store = Storage(**{**storage.__dict__, "options": bucket})
    assert images(ShardReader("s3://images/digits", "train", in_store)) == images(ShardReader(packed, "train"))
    assert verify("s3://images/digits", in_store) == 59
    with pytest.raises(OSError, match=r"s3://images/nothing/manifest.json cannot be read: FileNotFoundError"):
        ShardReader("s3://images/nothing", "train", in_store)


@pytest.mark.parametrize(
    "pattern",
    ["{root}/{split}-*.tar", "{root}/{split}-{{000000..00000{last}}}.tar", "s3://images/digits/{split}-*.tar"],
)
def test_shards_of_others_are_used_where_they_lie(pattern, bucket, packed, tmp_path):
    patterns = {
        split: pattern.format(root=packed, split=split, last=last) for split, last in [("train", 2), ("val", 0)]
    }
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)))
    settings = [f"{split}='{pattern}'" for split, pattern in patterns.items()]
    settings += [f"storage.cache_dir={tmp_path / 'cache'}", f"class_names={names}", "num_workers=1"]
    settings += [f"+storage.options.{key}='{value}'" for key, value in bucket.items()]
    pack_verb.run(config(tmp_path, "source=shards", f"out={tmp_path / 'set'}", *settings, verb="pack"))
    reader = ShardReader(tmp_path / "set", "train", Storage(cache_dir=str(tmp_path / "cache"), options=bucket))
    assert images(reader) == images(ShardReader(packed, "train"))
    assert reader.manifest["class_names"][3] == "digit 3"
    assert verify(tmp_path / "set", reader.storage) == 59
    assert not list((tmp_path / "set").glob("*.tar")) and not (tmp_path / "set/indexing").exists()
    assert "| train | 48 | 3 |" in (tmp_path / "set/README.md").read_text()
    described = [load_manifest(folder)["splits"]["train"]["shards"] for folder in (tmp_path / "set", packed)]
    assert [shard["sha256"] for shard in described[0]] == [shard["sha256"] for shard in described[1]]
    assert json.loads((tmp_path / "set/manifest.json").read_text())["splits"]["train"]["skipped"] == 0
