// Everything here is an addition: without it the report shows pairs side by side, in the prompts' order.
document.documentElement.classList.add("js");

document.querySelectorAll(".pair.full input").forEach((slider) => {
  slider.addEventListener("input", () => slider.parentElement.style.setProperty("--cut", slider.value + "%"));
});

const gallery = document.getElementById("gallery");
const order = document.getElementById("order");
if (gallery && order) {
  const cards = [...gallery.children];
  order.addEventListener("change", () => {
    const [key, direction] = order.value.split(" ");
    const value = (card) => (key in card.dataset ? Number(card.dataset[key]) : -Infinity);
    const sorted = key === "prompt" ? cards : [...cards].sort((a, b) => value(b) - value(a));
    gallery.append(...(direction === "worst" ? sorted.reverse() : sorted));
  });
}

const box = document.getElementById("box");
let shown = null;
function show(card) {
  shown = card;
  const pictures = [...card.querySelectorAll("img")].map((image) => {
    const figure = document.createElement("figure");
    figure.style.margin = "0";
    const caption = document.createElement("figcaption");
    caption.textContent = image.dataset.side;
    figure.append(image.cloneNode(), caption);
    return figure;
  });
  box.querySelector(".both").replaceChildren(...pictures);
  const parts = [...card.querySelectorAll(".info")].map((part) => part.cloneNode(true));
  parts.filter((part) => part.matches("details")).forEach((part) => { part.open = true; });
  box.querySelector(".info").replaceChildren(...parts);
  if (!box.open) box.showModal();
}
document.querySelectorAll(".open").forEach((button) => button.addEventListener("click", () => show(button.closest(".sample"))));
if (box) {
  const step = (by) => {
    const cards = [...gallery.children];
    show(cards[(cards.indexOf(shown) + by + cards.length) % cards.length]);
  };
  box.querySelector(".previous").addEventListener("click", () => step(-1));
  box.querySelector(".next").addEventListener("click", () => step(1));
  box.querySelector(".close").addEventListener("click", () => box.close());
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("close", () => shown && shown.querySelector(".open").focus());
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}

document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", async () => {
  const text = button.closest(".snippet").querySelector("pre").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page opened from a file has no clipboard in some browsers.
    getSelection().selectAllChildren(button.closest(".snippet").querySelector("pre"));
    document.execCommand("copy");
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 2000);
}));
