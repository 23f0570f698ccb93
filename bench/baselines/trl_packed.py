"""TRL's ``SFTTrainer`` with packing, which is what a careful user of libraries takes."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from bench.baselines.hf_trainer import TellSteps, common, load_quantized, lora, train_counted
from bench.baselines.job import conversations, read_job


def main() -> None:
    """Train once over the rows."""
    job = read_job()
    set_seed(job.seed)
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations(job)]
    trainer = SFTTrainer(
        model=load_quantized(job),
        args=SFTConfig(
            output_dir=f"{job.out}-trainer",
            packing=True,
            max_length=job.row_tokens,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            **common(job),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job),
    )
    trainer.add_callback(TellSteps(trainer.model))
    train_counted(trainer, job)


if __name__ == "__main__":
    main()
