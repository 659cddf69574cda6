// Draws the curves, says how old the page of a run that was going on is, and filters the examples. Nothing is
// made from text: lines are made of numbers, and elements are shown or hidden.
const put = (parent, name, given, text = "") => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in given) made.setAttribute(key, given[key]);
  made.textContent = text;
  parent.append(made);
};
for (const plot of document.querySelectorAll("svg[data-loss]")) {
  const [loss, rate] = [plot.dataset.loss, plot.dataset.lr].map((row) => row.trim().split(" ").map(Number));
  const logs = loss.map((value) => Math.log10(Math.max(value, 1e-6)));
  const low = Math.min(...logs), high = Math.max(...logs, low + 0.1), peak = Math.max(...rate);
  const height = (value) => 4 + 112 * (high - value) / (high - low);
  const line = (kind, heights) => put(plot, "polyline", {
    class: kind, points: heights.map((y, i) => `${100 * i / Math.max(1, heights.length - 1)},${y}`).join(" "),
  });
  const apart = Math.ceil((high - low) / 4);
  for (let power = apart * Math.ceil(low / apart); power <= high; power += apart) {
    put(plot.parentNode, "text", { class: "soft", x: "100%", y: height(power) - 3, "text-anchor": "end" }, String(10 ** power));
    put(plot, "line", { class: "grid", x1: 0, x2: 100, y1: height(power), y2: height(power) });
  }
  line("rate", rate.map((value) => 116 - 112 * value / peak));
  line("ours", logs.map(height));
}
const age = document.getElementById("age");
if (age) {
  const minutes = Math.round((Date.now() / 1000 - age.dataset.at) / 60);
  if (minutes > 1) age.textContent = ` (${minutes} minutes before you opened this page)`;
}
const filters = document.getElementById("filters");
if (filters) {
  const examples = [...document.querySelectorAll(".example")];
  const texts = examples.map((example) => example.textContent.toLowerCase());
  const chosen = [...filters.querySelectorAll("[data-filter]")];
  const apply = () => {
    const words = document.getElementById("words").value.toLowerCase();
    let shown = 0;
    examples.forEach((example, i) => {
      const fits = chosen.every((each) => !each.value || example.dataset[each.dataset.filter] === each.value);
      example.hidden = !(fits && texts[i].includes(words));
      shown += !example.hidden;
    });
    document.getElementById("shown").textContent = `${shown} shown`;
  };
  filters.hidden = false;
  filters.addEventListener("input", apply);
  filters.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
