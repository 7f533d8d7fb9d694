// Show a robot's chat as Tencent's TUIKit for Vue does, with the kit's own code.
//
// Standard input has the chat as JSON: [[flow, ID, element], ...], where flow is "in" or
// "out", and an ID that comes again is a message that was modified. Standard output gets
// {texts: what each message shows, by ID; streaming: whether the kit waits for an answer's
// end, after each event: then its input has a stop button and sends nothing}.
//
// The folder of this file must hold the kit in package/, and what the kit needs.

import { readFileSync } from "node:fs";
import { json } from "node:stream/consumers";
import { build } from "esbuild";
import { compileScript, parse } from "@vue/compiler-sfc";
import { JSDOM, VirtualConsole } from "jsdom";

const ROBOT = "@RBT#001";
const CHAT = `C2C${ROBOT}`;
const STEPS = 20; // of the typewriter between two changes, so that it lags behind
const SECOND = 1000; // ms; such a long timer is of the SDK, and may start itself again

const KIT = `
  export { createApp, h, nextTick, reactive } from "vue";
  export { default as robots } from "./components/TUIChat/aiRobotManager";
  export { default as Card } from
    "./components/TUIChat/message-list/message-elements/message-stream-markdown/index.vue";
`;

const vueFiles = {
  name: "vue",
  setup({ onLoad }) {
    onLoad({ filter: /\.vue$/ }, ({ path }) => {
      const { descriptor } = parse(readFileSync(path, "utf8"), { filename: path });
      const script = compileScript(descriptor, { id: path, inlineTemplate: true });
      return { contents: script.content, loader: "ts" };
    });
  },
};

async function bundle() {
  const { outputFiles } = await build({
    stdin: { contents: KIT, resolveDir: "package", loader: "ts" },
    plugins: [vueFiles],
    bundle: true,
    write: false,
    globalName: "kit",
    loader: { ".svg": "dataurl", ".png": "dataurl", ".scss": "empty" },
    define: { setTimeout: "later", "process.env.NODE_ENV": '"production"' },
    logLevel: "error",
  });
  return outputFiles[0].text;
}

function failed(error) {
  console.error(error);
  process.exitCode = 1;
}

const virtualConsole = new VirtualConsole().on("error", failed).on("jsdomError", failed);
const { window } = new JSDOM("", { runScripts: "outside-only", virtualConsole });
const due = []; // the typewriter's timers, which run when this script lets them
window.later = (work, pause) => pause >= SECOND || due.push(work);
window.eval(await bundle());
const { createApp, h, nextTick, reactive, robots, Card } = window.kit;

const messages = reactive([]);
const streaming = [];
let waits = false;
robots.onSteamingStatusChange((chats) => {
  waits = Boolean(chats[CHAT]);
});
const draw = (message) =>
  h("p", { id: message.ID, key: message.ID }, [
    h(Card, { payloadData: message.payload.data, message }),
  ]);
const app = createApp({ render: () => messages.filter(robots.isRobotMessage).map(draw) });
app.mount(window.document.body);

function take(flow, ID, { MsgType: type, MsgContent: content }) {
  const payload = { data: content.Data, text: content.Text };
  const known = messages.find((message) => message.ID === ID);
  if (known) {
    known.payload = payload;
  } else {
    const about = { ID, flow, type, payload, from: flow === "in" ? ROBOT : "jared" };
    messages.push({ ...about, conversationType: "C2C", time: Date.now() / 1000 });
  }
  robots.handleMessageList([...messages], CHAT);
}

for (const event of await json(process.stdin)) {
  take(...event);
  streaming.push(waits);
  await nextTick();
  for (let step = 0; step < STEPS && due.length; step++) due.shift()();
}
while (due.length) due.shift()();
await nextTick();

const shown = [...window.document.querySelectorAll("p[id]")];
const texts = Object.fromEntries(shown.map((one) => [one.id, one.querySelector("pre").textContent]));
console.log(JSON.stringify({ texts, streaming }));
window.close();
