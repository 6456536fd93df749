"use strict";
for (const box of document.querySelectorAll("#samples")) {
  const images = [...box.querySelectorAll(".stack img")];
  const input = box.querySelector("input"), button = box.querySelector("button"), label = box.querySelector(".step");
  let timer = null;
  const show = () => {
    images.forEach((image, number) => { image.hidden = number !== Number(input.value); });
    label.textContent = images[input.value].dataset.step;
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "▶"; };
  input.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    input.value = input.value === input.max ? 0 : input.value;
    show();
    button.textContent = "❚❚";
    timer = setInterval(() => {
      input.value = Number(input.value) + 1;
      show();
      if (input.value === input.max) stop();
    }, 700);
  });
  show();
}

const nearest = (values, wanted) => {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle; else high = middle;
  }
  return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
};

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const scale = (value) => chart.log ? Math.log(value) : value;
  const [low, high] = chart.x.map(scale), [start, end] = chart.at;
  const move = (event) => {
    const box = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, ((event.clientX - box.left) / box.width - start) / (end - start)));
    const wanted = chart.log ? Math.exp(low + part * (high - low)) : low + part * (high - low);
    const found = chart.series.map((each) => ({ each, at: nearest(each.x, wanted) }));
    const x = found.map(({ each, at }) => each.x[at])
      .reduce((one, other) => Math.abs(other - wanted) < Math.abs(one - wanted) ? other : one);
    tip.replaceChildren(`${chart.label} ${x.toLocaleString("en")}`);
    for (const { each, at } of found) {
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.className = `c${each.colour}`;
      const far = each.x[at] === x || each.x.length > 100 ? "" : ` (at ${each.x[at].toLocaleString("en")})`;
      row.append(dot, `${each.name} ${each.y[at].toLocaleString("en", { maximumSignificantDigits: 4 })}${far}`);
      tip.append(row);
    }
    const place = start + (end - start) * (scale(x) - low) / (high - low);
    const units = place * svg.viewBox.baseVal.width;
    cursor.setAttribute("x1", units);
    cursor.setAttribute("x2", units);
    cursor.removeAttribute("hidden");
    tip.hidden = false;
    const left = box.left - outer.left + place * box.width;
    tip.style.top = `${box.top - outer.top + 8}px`;
    tip.style.left = `${left + 12 + tip.offsetWidth > outer.width ? Math.max(4, left - 12 - tip.offsetWidth) : left + 12}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("hidden", ""); });
}
