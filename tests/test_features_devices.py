import pytest

from features import devices, ocr, regions
from pipeline import shards

STAGES = {"ocr": ocr, "regions": regions}


@pytest.fixture
def nothing_to_do(monkeypatch):
    monkeypatch.setattr(shards, "ShardFolder", lambda path: path)
    monkeypatch.setattr(shards, "chunks_of_folder", lambda folder, size: [])


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_is_taken_where_there_is_one_by_one_worker(stage, nothing_to_do, monkeypatch):
    jobs = {}
    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        jobs[has_gpu] = STAGES[stage].job("sample", STAGES[stage].Settings())
    assert [jobs[has_gpu].settings.device for has_gpu in (False, True)] == ["cpu", "cuda"]
    assert jobs[False].made_with() != jobs[True].made_with()
    monkeypatch.delenv("SMARTAVE_WORKERS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    workers = [shards.executor(job.threads, job.max_workers)[1] for job in (jobs[False], jobs[True])]
    assert workers == [8, 1]
    monkeypatch.setenv("SMARTAVE_WORKERS", "3")
    assert shards.executor(1, jobs[True].max_workers)[1] == 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_processor_that_is_asked_for_is_taken_beside_a_gpu(stage, nothing_to_do, monkeypatch):
    asked = STAGES[stage].Settings(device="cpu")
    alone = STAGES[stage].job("sample", asked).made_with()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert STAGES[stage].job("sample", asked).made_with() == alone


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(stage, nothing_to_do, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"{stage}.device is cuda, and torch sees no GPU"):
        STAGES[stage].job("sample", STAGES[stage].Settings(device="cuda"))


@pytest.mark.parametrize(("native", "precision"), [(True, ""), (False, "bfloat16"), (False, "float32")])
def test_bfloat16_without_instructions_for_it_is_told_to_be_slow(native, precision, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    devices.tell_if_slow(precision or "bfloat16", "cpu", "train")
    told = capsys.readouterr().err
    assert ("train.precision is bfloat16" in told) == (precision == "bfloat16")


def test_rapidocr_computes_on_processors(nothing_to_do, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ocr.job("sample", ocr.Settings(engine="rapidocr")).settings.device == "cpu"


def test_settings_stay_as_they_are_but_for_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = regions.Settings(max_boxes=7)
    assert devices.here(given, "regions") == given.model_copy(update={"device": "cuda"})
