"use strict";
const number = (v) => String(Number(v.toPrecision(4)));
const element = (name, properties, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};
for (const plot of document.querySelectorAll(".plot")) {
  const { x, y, series } = JSON.parse(plot.dataset.chart);
  const guide = plot.querySelector(".guide"), tip = plot.querySelector(".tip");
    const place = (p, box) => [
    (p[0] - x[0]) / (x[1] - x[0]) * box.width, (1 - (p[1] - y[0]) / (y[1] - y[0])) * box.height];
  const nearest = (points, at, box) => {
    let best = null, least = Infinity;
    for (const p of points) {
      const [px, py] = place(p, box);
      const d = plot.dataset.dots ? Math.hypot(px - at[0], py - at[1]) : Math.abs(px - at[0]);
      if (d < least) { least = d; best = p; }
    }
    return { point: best, distance: least };
  };
  const line = (text, colour) => {
    const part = document.createElement("div");
    if (colour !== null) part.className = "c" + colour;
    part.textContent = text;
    return part;
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top];
    const nearby = series.map((s) => nearest(s.points, at, box));
    const closest = nearby.reduce((a, b) => (b.distance < a.distance ? b : a));
    const left = place(closest.point, box)[0];
    const values = nearby.map((f, i) => [f, i]).filter(([f]) => f.point[0] === closest.point[0])
      .map(([f, i]) => line(series[i].label + "  " + number(f.point[1]), series[i].colour));
    tip.replaceChildren(line(plot.dataset.x + " " + number(closest.point[0]), null), ...values);
    guide.style.left = left + "px";
    guide.hidden = tip.hidden = false;
    tip.style.left = Math.min(Math.max(0, left + 8), Math.max(0, box.width - tip.offsetWidth)) + "px";
    if (left + 8 + tip.offsetWidth > box.width) {
      tip.style.left = Math.max(0, left - 8 - tip.offsetWidth) + "px";
    }
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { guide.hidden = tip.hidden = true; });
}

// Samples: sorted by a number, with tokens shaded by another.
const choice = (label, names, act) => {
  const select = element("select", {}, ...names.map((name) => element("option", { value: name }, name)));
  select.addEventListener("change", () => act(select.value));
  return element("label", {}, label + " ", select);
};
const unite = (objects) => [...new Set(objects.flatMap(Object.keys))];

for (const group of document.querySelectorAll(".samples")) {
  const articles = [...group.children];
  const keys = new Map(articles.map((a) => [a, JSON.parse(a.dataset.keys)]));
  const texts = [...group.querySelectorAll(".tokens")];
  const measures = new Map(texts.map((t) => [t, JSON.parse(t.dataset.measures)]));
  const controls = element("div", { className: "controls" });

  let by = "order", falling = true;
  const sort = () => {
    const value = (a) => (by in keys.get(a) ? keys.get(a)[by] : -Infinity);
    const sorted = by === "order" ? articles.slice() : articles.slice().sort((a, b) => value(b) - value(a));
    group.append(...(falling ? sorted : sorted.reverse()));
  };
  if (articles.length > 1) {
    const turn = element("button", { type: "button", textContent: "↓", ariaLabel: "reverse the order" });
    turn.addEventListener("click", () => { falling = !falling; turn.textContent = falling ? "↓" : "↑"; sort(); });
    controls.append(element("span", {}, choice("sort by", ["order", ...unite([...keys.values()])], (name) => { by = name; sort(); }), " ", turn));
  }

  const names = unite([...measures.values()]);
  if (names.length) {
    const scale = element("span", { className: "scale" });
    const shade = (name) => {
      const sizes = texts.flatMap((t) => measures.get(t)[name] || []).map(Math.abs).sort((a, b) => a - b);
      const most = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;  // outliers are fully shaded
      for (const text of texts) {
        const values = measures.get(text)[name] || [];
        [...text.children].forEach((token, i) => {
          token.className = !(i in values) ? "" : values[i] < 0 ? "minus" : "plus";
          if (i in values) token.style.setProperty("--a", 0.75 * Math.min(1, Math.abs(values[i]) / most));
        });
      }
      scale.hidden = name === "nothing";
      scale.replaceChildren(number(-most), element("i"), number(most));
    };
    for (const text of texts) {
      const note = element("p", { className: "token-note", hidden: true });
      text.after(note);
      text.addEventListener("click", (event) => {
        const index = [...text.children].indexOf(event.target);
        if (index < 0) return;
        [...text.children].forEach((token, i) => token.classList.toggle("chosen", i === index));
        const values = Object.entries(measures.get(text)).map(([name, each]) => name + " " + number(each[index]));
        note.hidden = false;
        note.textContent = JSON.stringify(event.target.textContent) + ": " + values.join(", ");
      });
    }
    controls.append(choice("shade tokens by", [...names, "nothing"], shade), scale);
    shade(names[0]);
  }
  if (controls.childElementCount) group.before(controls);

  if (articles.length > 6) {
    group.classList.add("few");
    const more = element("button", { type: "button", className: "more", textContent: articles.length - 6 + " more" });
    more.addEventListener("click", () => { group.classList.remove("few"); more.remove(); });
    group.after(more);
  }
}
