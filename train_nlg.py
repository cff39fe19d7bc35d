"""Fine-tune a decoder or T5 checkpoint with BA-LoRA, LoRA, PiSSA or in full; see `--help`.

The whole story, top to bottom: load, adapt, then per step the teacher, the student, their terms and the update; save.
"""

import minibalora as mb  # first, so that Ctrl-C during the imports ends quietly (base/interrupts.py)

# isort: split
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, recorded_settings
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.template import ALPACA, choose_template, save_template
from minibalora.checkpoints.weights import skeleton, weights_digest
from minibalora.data import batches, files, prompts
from minibalora.evaluation import records
from minibalora.evaluation.forgetting import measure_retained, read_retained
from minibalora.models.mixture import MixtureConfig, keep_router_outputs, load_balance
from minibalora.objective import head_of, lambdas
from minibalora.run import checkpoint, run_folder
from minibalora.run.adapting import adapt_model, truncate_adapter
from minibalora.run.flags import parse_nlg_flags
from minibalora.run.hardware import fit_hardware
from minibalora.run.loop import Run, optimizer_of, steps_of_run
from minibalora.run.memory import expected_memory, generation_loss
from minibalora.run.plan import nlg_formula, print_plan
from minibalora.run.teacher import run_cache, teacher_states
from minibalora.run.term_warnings import nlg_warnings
from minibalora.toy import problems


def main() -> int:
    distributed.join()
    settings = parse_nlg_flags()
    source, objective, adaptation = settings.source, settings.objective, settings.adaptation
    optimisation, hardware, output = settings.optimisation, settings.hardware, settings.output
    out, rows_at_once, is_full = output.folder, optimisation.micro_batch_size, adaptation.method == "full"
    run_folder.check_apart(out, source.model, source.data)
    distributed.on_main(run_folder.check_out, out, output.resume)
    if adaptation.init_cache is not None:
        check_writable(adaptation.init_cache, "--init-cache")
    torch.manual_seed(optimisation.seed)

    # Load: data, tokenizer, model.
    if source.data is None:
        examples = problems.examples_of(problems.clean_problems(source.max_rows, optimisation.seed))
        template, left_out, held_out = ALPACA, {}, problems.held_out_problems(rows_at_once)
        fields = ()
    else:
        is_chat = prompts.has_conversations(source.data)  # then the model's own template, if it has one
        template = choose_template(source.template or (None if is_chat else "alpaca"), Path(source.model))
        if output.resume:
            template.resume(recorded_settings(out))
        fields = source.prompt_field, source.response_field, source.input_field
        examples, left_out = prompts.read_examples(source.data, *fields, source.max_rows, template)
        held_out = records.read_held_out(source.eval, source.eval_task, fields, template, rows_at_once)
    tok, config = mb.load_tokenizer(source.model, template.chat), read_config(Path(source.model))
    rows, truncated, dropped = batches.encode_examples(examples, tok, source.max_length)
    if not rows:
        raise InputError(f"--max-length {source.max_length} leaves no room for a response in any row: raise it")
    if objective.router_aux > 0 and not isinstance(config, MixtureConfig):
        raise InputError(f"--router-aux-loss: {source.model} has no experts to choose from: leave it out")
    batches.check_fits(rows, source.data, config, source.max_length, source.model)
    measured_rows, _, _ = batches.encode_examples(held_out.items, tok, sys.maxsize)
    batches.check_fits(measured_rows, source.eval, config, source.max_length, source.model)
    retained = read_retained(source.retain or [], fields, template, tok, config, source.max_length)
    held_out = replace(held_out, retained=retained)
    digests = {"data_digest": prompts.examples_digest(examples), "model_digest": weights_digest(source.model)}
    recorded, steps = settings.recorded | digests | template.settings, steps_of_run(optimisation, len(rows))
    resumed = distributed.on_main(checkpoint.resumed_step, out, recorded, steps) if output.resume else None
    cache = None
    if output.teacher_cache is not None:
        cache = run_cache(output.teacher_cache, source.model, rows, adaptation, hardware, optimisation.seed)
    if hardware.fsdp:
        model = skeleton(source.model)  # without weights: each rank reads only those that it keeps, once sharded
    else:
        place = "cpu" if adaptation.quantize else hardware.device  # unquantised, it may not fit on the GPU
        model = mb.load_model(source.model, dtype=torch.float32 if is_full else hardware.dtype, device=place)

    # Adapt: W becomes W_res + s A B, and only the adapters are trained.
    if not is_full:
        adapt_model(model, adaptation, hardware, optimisation.seed, out if resumed is not None else None)
    longest = batches.pack(batches.longest(rows, rows_at_once), "cpu")
    loss_of = partial(generation_loss, longest, objective, optimisation.micro_batches, adaptation.is_plain)
    ranks = distributed.size() if hardware.fsdp else 1
    memory = expected_memory(model, hardware, loss_of, optimisation.micro_batches > 1, ranks)
    fit_hardware(model, hardware)
    optimizer, head = optimizer_of(model, adaptation.rate_of_b), head_of(model, adaptation.is_plain)
    if not output.resume:
        distributed.on_main(run_folder.start_run, out, recorded)
    left_out = {"responses cut": truncated, "rows too long": dropped} | left_out
    data = [batches.in_words(rows, source.data and files.named(source.data))]
    data.append(f"{prompts.counts_in_words(left_out)}, of at most {source.max_rows:,} rows (--max-rows)")
    data.append(f"template {template}")
    data += [f"retain {batches.in_words(texts, name)}" for name, texts in retained.items()]
    if any(held_out.left_out.values()):
        data.append(f"of {source.eval} {prompts.counts_in_words(held_out.left_out)}")
    if not tok.eos_ids:
        data.append("no EOS: none of the model's files names one, so the model will not learn to end a response")
    warnings = nlg_warnings(objective, rows_at_once, [row.predicted for row in rows])
    print_plan(settings, model, [nlg_formula(objective, head.is_whole), *warnings], data, steps, memory)

    # At step 0 the student is the pre-trained model, whatever the init.
    torch.backends.cuda.matmul.allow_tf32 = hardware.tf32  # only now: PiSSA's SVDs need every bit
    measure = partial(records.measure, model, tok, held_out)
    before = distributed.on_main(measure, out / "eval-before.jsonl", recorded["model_digest"])

    # Train: L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR. A step is a batch of rows, cut into micro-batches, then one
    # update. However the step is cut, L is a mean over its response tokens, except for the spectral term (see
    # `nlg_loss`) and the load balance, a product of two means. Both are computed per micro-batch and averaged.
    if objective.router_aux > 0:
        keep_router_outputs(model)
    with Run(output, optimisation, hardware, model, optimizer, steps, resumed) as run:
        for step, parts in run.steps(rows):
            packed = [batches.pack(part.rows, hardware.device) for part in parts]
            teachers = [None] * len(parts)
            if objective.needs_teacher:
                teachers = teacher_states(model, packed, [part.rows for part in parts], cache)  # (M, d) each
            unsure = None
            if objective.adaptive_lambda1:
                shares = [head.entropy_share(teacher, objective.temperature) for teacher in teachers]
                mean = sum(part.share * share for part, share in zip(parts, shares, strict=True))
                unsure = distributed.total(mean.item())  # waits for a GPU, as else only run.update does
            weights = lambdas(objective, step, steps, unsure)

            for part, batch, teacher in zip(parts, packed, teachers, strict=True):
                with run.autocast():
                    student = batch.states(model)  # (M, d)
                    loss, terms = head.loss(student, teacher, batch.targets, objective, weights)
                    if objective.router_aux > 0:
                        terms["router_aux"] = load_balance(model)
                        loss = loss + objective.router_aux * terms["router_aux"]
                (part.share * loss).backward()
                run.note(part, loss, terms)
            run.update()
            if source.retain_every is not None and run.step % source.retain_every == 0:
                run.entry |= distributed.on_main(measure_retained, model, retained, rows_at_once)

    # Save, on rank 0: the adapter for the original base, in PEFT's format; with --method full, the whole model.
    if is_full:
        distributed.on_main(mb.save_model, model.to(hardware.dtype), out / "model")
    else:
        truncate_adapter(model, output.adapter_rank)
        distributed.on_main(mb.save_adapter, model, out)
    distributed.on_main(save_template, template, out / "model" if is_full else out)
    status = run.say_end()
    if not run.signal:
        after = distributed.on_main(measure, out / "eval-after.jsonl", checkpoint.trained_digest(model))
        distributed.on_main(records.write_report, out, before[0], after[0])
        if after[0]:
            print("\n" + records.before_and_after(before, after))
    distributed.leave()
    return status


if __name__ == "__main__":
    cli.run_script(
        main,
        smaller="lower --micro-batch-size or add --grad-checkpoint",
        resuming="give the same command to continue, with --resume if --out exists",
    )
