// Filters the examples. Nothing is made from text: elements are only shown or hidden.
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
