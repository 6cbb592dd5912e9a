import pytest
from event_files import scalars

from experiments import metrics


def write(folder, steps, resume_after=0):
    with metrics.Writer(folder, resume_after) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 3}, clock={"speed": 7.0})


def test_lines_are_what_was_written_without_the_clock(tmp_path):
    write(tmp_path, [10, 20])
    assert metrics.read(tmp_path) == [
        {"step": 10, "loss": 10 / 3},
        {"step": 20, "loss": 20 / 3},
    ]


def test_resuming_forgets_later_lines_and_one_that_was_cut_off(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    path = tmp_path / metrics.FILE_NAME
    with path.open("a") as file:
        file.write('{"step": 50, "lo')

    write(tmp_path, [30], resume_after=20)

    assert [line["step"] for line in metrics.read(tmp_path)] == [10, 20, 30]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_line_cut_off_inside_a_kept_step_is_forgotten(tmp_path):
    path = tmp_path / metrics.FILE_NAME
    path.write_text('{"step": 10}\n{"step": 20')
    metrics.forget_after(path, 20)
    assert path.read_text() == '{"step": 10}\n'


def test_nothing_to_forget_leaves_the_file_alone(tmp_path):
    write(tmp_path, [10])
    path = tmp_path / metrics.FILE_NAME
    before = path.stat().st_ino
    metrics.forget_after(path, 10)
    metrics.forget_after(tmp_path / "missing.jsonl", 10)
    assert path.stat().st_ino == before


def test_other_processes_write_nothing(tmp_path):
    with metrics.Writer(tmp_path, enabled=False) as writer:
        writer.write({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_numbers_and_the_clock(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [20], resume_after=10)
    first, second = ((tmp_path / "tensorboard").glob(f"*_{n}") for n in (0, 10))
    assert scalars(*first) == {
        ("loss", 10): pytest.approx(10 / 3),
        ("loss", 20): pytest.approx(20 / 3),
        ("speed", 10): 7.0,
        ("speed", 20): 7.0,
    }
    assert scalars(*second).keys() == {("loss", 20), ("speed", 20)}
