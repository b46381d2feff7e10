// Perfetto's trace processor, compiled to WebAssembly, in Node: node trace_processor.mjs FOLDER TRACE < QUERIES
//
// FOLDER has trace_processor.wasm, engine_bundle.node.js (the worker of Perfetto's UI) and engine.mjs (its
// client). QUERIES: a JSON list of SQL texts. Writes a JSON list: for each its rows, as objects, or {"error": text}.

import fs from 'node:fs';
import path from 'node:path';
import vm from 'node:vm';
import { pathToFileURL } from 'node:url';

const [folder, trace] = process.argv.slice(2);
const queries = JSON.parse(fs.readFileSync(0, 'utf8'));
const { EngineBase } = await import(pathToFileURL(path.join(folder, 'engine.mjs')));

// The worker's world. It tries a module that is nothing but a memory to learn whether 64-bit ones are there: FOLDER
// has no module with such a one. It loads the other synchronously.
const wasm = Object.create(WebAssembly);
wasm.Module = function (bytes) {
  if (bytes[8] === 5) throw new Error('no 64-bit memories');
  return new WebAssembly.Module(bytes);
};
class Request {
  open(_, url) { this.file = path.join(folder, path.basename(url)); }
  send() { this.response = new Uint8Array(fs.readFileSync(this.file)).buffer; }
}
const nothing = () => {};
const world = {
  WebAssembly: wasm, XMLHttpRequest: Request, WorkerGlobalScope: nothing, location: { href: 'file:///worker.js' },
  console: { log: nothing, warn: nothing, error: nothing, info: nothing, debug: nothing },
  performance, setTimeout, clearTimeout, crypto, TextDecoder, TextEncoder, URL, Uint8Array, ArrayBuffer,
  Error, TypeError, RangeError, // those that WebAssembly throws
};
world.self = world;
world.globalThis = world;
vm.runInContext(fs.readFileSync(path.join(folder, 'engine_bundle.node.js'), 'utf8'), vm.createContext(world));

const { port1, port2 } = new MessageChannel();
class Engine extends EngineBase {
  id = 'node';
  mode = 'WASM';
  rpcSendRequestBytes(data) { port2.postMessage(data); }
}
const engine = new Engine();
port2.onmessage = (message) => engine.onRpcResponseBytes(message.data);
world.onmessage({ data: port1 });
await new Promise(setImmediate); // microtasks: the module's initialization

const warn = console.warn;
console.warn = (...words) => { if (!String(words[0]).includes('QueryResult field')) warn(...words); };
const bytes = fs.readFileSync(trace);
for (let at = 0; at < bytes.length; at += 1 << 24) await engine.parse(new Uint8Array(bytes.subarray(at, at + (1 << 24))));
await engine.notifyEof();

const plain = (value) => (typeof value === 'bigint' ? (BigInt(Number(value)) === value ? Number(value) : String(value)) : value);
const answers = [];
for (const query of queries) {
  try {
    const result = await engine.query(query);
    const rows = [];
    const columns = result.columns();
    for (const row = result.iter({}); row.valid(); row.next()) {
      rows.push(Object.fromEntries(columns.map((name) => [name, plain(row.get(name))])));
    }
    answers.push(rows);
  } catch (error) {
    answers.push({ error: String(error) });
  }
}
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
