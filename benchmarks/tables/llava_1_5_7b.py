"""LLaVA-1.5-7B at the published budgets, at equal true ones, and controls; see table.py."""

from table import Row, Table, run

TABLE = Table(
    title="LLaVA-1.5-7B, 576 vision tokens, published schedules of arXiv 2508.06084 and true budgets",
    model="llava-hf/llava-1.5-7b-hf",
    tasks=("gqa", "mme", "pope", "scienceqa_img", "textvqa_val", "vizwiz_vqa_val", "vqav2_val", "seedbench"),
    rows=(
        Row("vanilla", true_average=576),
        Row("paper 128", "preset=llava-1.5-7b/128", true_average=146.2),
        Row("paper 64", "preset=llava-1.5-7b/64", published=93.1, true_average=82.9),
        Row("paper 48", "preset=llava-1.5-7b/48", true_average=66.7),
        Row("paper 32", "preset=llava-1.5-7b/32", true_average=51.0),
        *(
            Row(f"{method} true {budget}", f"method={method},budget={budget}", true_average=budget)
            for budget in (192, 128, 64, 32)
            for method in ("adaptinfer", "random")
        ),
    ),
)

if __name__ == "__main__":
    run(TABLE)
