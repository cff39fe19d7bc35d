"""What a run forgets: the files of --retain, and the loss and KL on them."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import stretch

import minibalora as mb
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.template import ALPACA
from minibalora.evaluation.forgetting import measure_retained, read_retained
from minibalora.evaluation.perplexity import mean_predictions, predict
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

TEXT = "Ada has 3 apples. Ben has 4 pears. " * 20


@pytest.fixture(scope="module")
def tuned():
    """The built-in model with a changed adapter, its tokenizer and configuration."""
    torch.manual_seed(0)
    model = mb.adapt(mb.load_model(MODEL), rank=4, init="pissa")
    stretch(model)
    return model, mb.load_tokenizer(MODEL), read_config(MODEL)


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean_problems(5, seed=0)))
    return [str(tmp_path / "text.txt"), str(tmp_path / "rows.jsonl")]


def test_means_are_those_of_the_predicted_tokens(tuned, files):
    model, tok, config = tuned
    retained = read_retained(files, (), ALPACA, tok, config, 50)
    text, rows = (retained[file] for file in files)
    assert all(len(row.ids) <= 50 for row in text) and len(text) > 2 and len(rows) == 5
    column = measure_retained(model, retained, 3)
    whole = mean_predictions([predict(model, row.ids.tolist()) for row in text])
    assert column[f"loss on {files[0]}"] == pytest.approx(whole["loss"], rel=1e-5)
    assert (
        column[f"KL(pre-trained ‖ tuned) on {files[0]}"] == pytest.approx(whole["kl"], rel=1e-4) and whole["kl"] > 0.01
    )
    losses = []
    for row in rows:
        log_p = model(torch.tensor(row.ids[None, :-1].tolist()))[0].log_softmax(-1)[row.prompt_length - 1 :]
        losses.append(-log_p.gather(1, torch.tensor(row.ids[row.prompt_length :, None].tolist())))
    assert column[f"loss on {files[1]}"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_rows_that_are_left_out_are_counted(tuned, tmp_path, capsys):
    rows = [
        {"query": "a", "response": "5"},
        {"query": "b", "response": ""},
        {"conversations": [{"from": "human", "value": "c"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_retained([str(path)], (), ALPACA, *tuned[1:], 50)[str(path)]) == 1
    printed = capsys.readouterr().out
    assert printed == f"retain {path}: left out 1 conversations without a reply, 1 empty responses\n"


def test_a_model_without_an_adapter_has_no_kl_and_an_untrained_one_has_kl_0(tuned, files):
    _, tok, config = tuned
    retained = read_retained(files[:1], (), ALPACA, tok, config, 50)
    plain = mb.load_model(MODEL)
    column = measure_retained(plain, retained, 4)
    assert list(column) == [f"loss on {files[0]}"]
    adapted = measure_retained(mb.adapt(plain, rank=4, init="lora"), retained, 4)
    assert adapted == {
        f"loss on {files[0]}": column[f"loss on {files[0]}"],
        f"KL(pre-trained ‖ tuned) on {files[0]}": 0.0,
    }


def test_measuring_leaves_the_mode_of_each_module(tuned, files):
    model, tok, config = tuned
    model.train()
    measure_retained(model, read_retained(files[:1], (), ALPACA, tok, config, 50), 4)
    assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize(
    "content, part", [(b"", "fewer than two tokens"), (b"\xff\xfe", "not valid UTF-8"), (b"{", "broken JSON")]
)
def test_unreadable_files_are_refused(content, part, tuned, tmp_path, refuses):
    (tmp_path / "file").write_bytes(content)
    refuses(lambda: read_retained([str(tmp_path / "file")], (), ALPACA, *tuned[1:], 50), tmp_path / "file", part)
    refuses(lambda: read_retained([str(tmp_path / "none")], (), ALPACA, *tuned[1:], 50), "none: no such file")


def test_rows_that_do_not_fit_are_refused(tuned, tmp_path, refuses):
    model, tok, config = tuned
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": TEXT * 20, "response": "5"}))
    refuses(lambda: read_retained([str(tmp_path / "rows.jsonl")], (), ALPACA, tok, config, 50), "rows.jsonl, line 1")


def test_a_t5_predicts_no_plain_text(files, tuned, refuses):
    tok = SimpleNamespace(is_encoder_decoder=True)
    refuses(lambda: read_retained(files[:1], (), ALPACA, tok, tuned[2], 50), "--retain", "a T5")
