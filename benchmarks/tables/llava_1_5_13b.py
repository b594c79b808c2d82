"""LLaVA-1.5-13B at the published labels; the paper does not print its schedule, ours fits the labels. See table.py."""

from table import Row, Table, run

TABLE = Table(
    title="LLaVA-1.5-13B, 576 vision tokens, schedules that fit the labels of arXiv 2508.06084, and true budgets",
    model="llava-hf/llava-1.5-13b-hf",
    tasks=("gqa", "mme", "pope", "scienceqa_img", "textvqa_val", "vizwiz_vqa_val", "vqav2_val", "seedbench"),
    rows=(
        Row("vanilla", true_average=576),
        Row("paper 128", "preset=llava-1.5-13b/128", true_average=142.4),
        Row("paper 64", "preset=llava-1.5-13b/64", true_average=78.9),
        *(
            Row(f"{method} true {budget}", f"method={method},budget={budget}", true_average=budget)
            for budget in (192, 128, 64)
            for method in ("adaptinfer", "random")
        ),
    ),
)

if __name__ == "__main__":
    run(TABLE)
