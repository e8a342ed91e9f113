// Debezium's embedded engine with a consumer that only counts: the peer of `capture.py`, run by `debezium.py`.
//
//     java -cp 'libs/*' Debezium.java EXPECTED KEY=VALUE ...
//
// Prints one line of JSON once EXPECTED changes have come, with the processor time at half of them and at the end.

import com.sun.management.OperatingSystemMXBean;
import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.lang.management.ManagementFactory;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

public class Debezium {
  static final OperatingSystemMXBean SYSTEM =
      (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();

  static long expected, changes, halfChanges, bytes;
  static double halfCpu, endCpu, halfAt, endAt;
  static final CountDownLatch done = new CountDownLatch(1);
  static volatile String failure;

  static double cpu() {
    return SYSTEM.getProcessCpuTime() / 1e9;
  }

  static double now() {
    return System.nanoTime() / 1e9;
  }

  static void handle(
      List<ChangeEvent<String, String>> records,
      DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer)
      throws InterruptedException {
    for (ChangeEvent<String, String> record : records) {
      bytes += record.value() == null ? 0 : record.value().length();
      committer.markProcessed(record);
    }
    committer.markBatchFinished();
    changes += records.size();
    if (halfChanges == 0 && changes * 2 >= expected) {
      halfChanges = changes;
      halfCpu = cpu();
      halfAt = now();
    }
    if (changes >= expected && endCpu == 0) {
      endCpu = cpu();
      endAt = now();
      done.countDown();
    }
  }

  public static void main(String[] arguments) throws Exception {
    expected = Long.parseLong(arguments[0]);
    long patience = Long.parseLong(arguments[1]);
    Properties settings = new Properties();
    for (int at = 2; at < arguments.length; at++) {
      String[] pair = arguments[at].split("=", 2);
      settings.setProperty(pair[0], pair[1]);
    }
    double began = now();
    var engine =
        DebeziumEngine.create(Json.class)
            .using(settings)
            .using(
                (DebeziumEngine.CompletionCallback)
                    (success, message, error) -> {
                      failure = success ? failure : message + (error == null ? "" : ": " + error);
                      done.countDown();
                    })
            .notifying(Debezium::handle)
            .build();
    var threads = Executors.newSingleThreadExecutor();
    threads.execute(engine);
    boolean came = done.await(patience, TimeUnit.SECONDS);
    if (!came || endCpu == 0) {
      System.err.println(came ? "the engine gave up: " + failure : changes + " changes came in " + patience + " s");
      System.exit(1);
    }
    System.out.printf(
        "{\"changes\": %d, \"wall_s\": %.3f, \"cpu_s\": %.3f, \"steady_changes\": %d, \"steady_s\": %.3f, \"steady_cpu_s\": %.3f}%n",
        changes, endAt - began, endCpu, changes - halfChanges, endAt - halfAt, endCpu - halfCpu);
    System.out.flush();
    // What is left of the connector's threads and of the slot is the caller's.
    Runtime.getRuntime().halt(0);
  }
}
