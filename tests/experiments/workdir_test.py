import json

import pytest

from configs import base
from experiments import workdir


def test_a_new_folder_gets_the_config(tmp_path):
    config = base.Config(seed=3)
    folder = workdir.claim(tmp_path / "a" / "b", config)
    saved = json.loads((folder / workdir.CONFIG_NAME).read_text())
    assert saved["seed"] == 3
    assert saved["model"]["widths"] == [300, 100]
    assert [path.name for path in folder.iterdir()] == [workdir.CONFIG_NAME]
    assert workdir.claim(folder, config) == folder


def test_asking_alone_makes_nothing(tmp_path):
    workdir.claim(tmp_path / "a", base.Config(), write=False)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_another_config_is_refused_with_the_difference(tmp_path):
    workdir.claim(tmp_path, base.Config())
    path = tmp_path / workdir.CONFIG_NAME
    before = path.read_bytes()

    other = base.Config(seed=1, model=base.Model(widths=(5,)))
    with pytest.raises(ValueError, match="another config") as error:
        workdir.claim(tmp_path, other)

    assert "  config.model.widths: [300, 100] -> [5]\n" in str(error.value)
    assert "  config.seed: 0 -> 1\n" in str(error.value)
    assert "num_steps" not in str(error.value)
    assert path.read_bytes() == before


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gcsfuse, got 'gs://bucket/run'"):
        workdir.claim("gs://bucket/run", base.Config())
    assert not list(tmp_path.iterdir())


def test_a_field_that_one_config_lacks_is_a_difference(tmp_path):
    workdir.claim(tmp_path, base.Config())
    path = tmp_path / workdir.CONFIG_NAME
    saved = json.loads(path.read_text())
    del saved["seed"]
    saved["model"]["kernel"] = 3
    path.write_text(json.dumps(saved))

    with pytest.raises(ValueError) as error:
        workdir.claim(tmp_path, base.Config())

    assert "config.model.kernel: 3 -> '(absent)'" in str(error.value)
    assert "config.seed: '(absent)' -> 0" in str(error.value)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_results_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no config.json that says which run"):
        workdir.claim(tmp_path, base.Config())
    assert [path.name for path in tmp_path.iterdir()] == [name]
